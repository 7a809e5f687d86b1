#include "apply/weight_replacements.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "base/error.h"

namespace winnow {

void WeightReplacements::Add(const TensorSlice& slice, std::shared_ptr<const SafetensorsFile> file,
                             const std::string& name) {
  const TensorInfo& tensor = file->Get(name);
  if (!slice.packed.empty()) {
    throw UsageError(
        fmt::format("{} is packed: its weights cannot be replaced one matrix at a time",
                    slice.tensor->name),
        "change the original model, quantise last");
  }
  const bool same = tensor.dtype == slice.tensor->dtype;
  const uint64_t elements = slice.bytes() * 8 / DtypeBits(slice.tensor->dtype);
  if ((!same && !(IsComputeDtype(tensor.dtype) && IsComputeDtype(slice.tensor->dtype))) ||
      tensor.bytes * 8 / DtypeBits(tensor.dtype) != elements) {
    throw ModelError(fmt::format("{}: tensor {} is {}, expected {} elements of {}",
                                 file->path().string(), name, tensor.Describe(), elements,
                                 DtypeName(slice.tensor->dtype)));
  }
  places_[{slice.tensor, slice.offset_bytes}] = {.source_offset = slice.offset_bytes,
                                                 .source_bytes = slice.bytes(),
                                                 .file = file.get(),
                                                 .file_offset = tensor.file_offset,
                                                 .bytes = tensor.bytes,
                                                 .dtype = tensor.dtype};
  const SafetensorsFile* key = file.get();
  files_.emplace(key, std::move(file));
}

const WeightReplacements::Place* WeightReplacements::Find(const TensorInfo& tensor, uint64_t offset,
                                                          uint64_t limit, uint64_t& end) const {
  end = limit;
  const auto after = places_.upper_bound({&tensor, offset});
  if (after != places_.end() && after->first.first == &tensor) {
    end = std::min(limit, after->first.second);
  }
  if (after == places_.begin()) return nullptr;
  const auto& [key, place] = *std::prev(after);
  if (key.first != &tensor || offset >= place.source_offset + place.source_bytes) return nullptr;
  end = std::min(end, place.source_offset + place.source_bytes);
  return &place;
}

}  // namespace winnow
