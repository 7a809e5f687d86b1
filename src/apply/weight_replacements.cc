#include "apply/weight_replacements.h"

#include <fmt/format.h>

#include "base/error.h"

namespace winnow {

void WeightReplacements::Add(const TensorSlice& slice, std::shared_ptr<const SafetensorsFile> file,
                             const std::string& name) {
  const TensorInfo& tensor = file->Get(name);
  const bool same = tensor.dtype == slice.tensor->dtype;
  const uint64_t elements = slice.bytes() * 8 / DtypeBits(slice.tensor->dtype);
  if ((!same && !(IsComputeDtype(tensor.dtype) && IsComputeDtype(slice.tensor->dtype))) ||
      tensor.bytes * 8 / DtypeBits(tensor.dtype) != elements) {
    throw ModelError(fmt::format("{}: tensor {} is {}, expected {} elements of {}",
                                 file->path().string(), name, tensor.Describe(), elements,
                                 DtypeName(slice.tensor->dtype)));
  }
  places_[{slice.tensor, slice.offset_bytes}] = {file.get(), tensor.file_offset, tensor.bytes,
                                                 tensor.dtype};
  const SafetensorsFile* key = file.get();
  files_.emplace(key, std::move(file));
}

const WeightReplacements::Place* WeightReplacements::Find(const TensorInfo& tensor,
                                                          uint64_t offset) const {
  const auto found = places_.find({&tensor, offset});
  return found == places_.end() ? nullptr : &found->second;
}

}  // namespace winnow
