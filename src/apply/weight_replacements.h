// New bytes for matrices of a checkpoint, e.g. healed down projections: where apply reads them
// instead of the source. Same shape as what they replace; F32, F16 or BF16, which apply converts.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "checkpoint/safetensors_file.h"  // SafetensorsFile
#include "model/model.h"                  // TensorSlice

namespace winnow {

class WeightReplacements {
 public:
  struct Place {
    uint64_t source_offset = 0;  // in the tensor it replaces a part of
    uint64_t source_bytes = 0;
    const SafetensorsFile* file = nullptr;
    uint64_t file_offset = 0;
    uint64_t bytes = 0;
    Dtype dtype = Dtype::kF32;
  };

  // The tensor `name` of `file` takes the place of `slice`. ModelError if it has another number of
  // elements or is not a format that is converted.
  void Add(const TensorSlice& slice, std::shared_ptr<const SafetensorsFile> file,
           const std::string& name);
  // What replaces the byte at `offset` of `tensor`; null: nothing. `end`: up to where that holds,
  // at most `limit`.
  const Place* Find(const TensorInfo& tensor, uint64_t offset, uint64_t limit, uint64_t& end) const;
  bool empty() const { return places_.empty(); }
  size_t size() const { return places_.size(); }

 private:
  std::map<std::pair<const TensorInfo*, uint64_t>, Place> places_;
  std::map<const SafetensorsFile*, std::shared_ptr<const SafetensorsFile>> files_;
};

}  // namespace winnow
