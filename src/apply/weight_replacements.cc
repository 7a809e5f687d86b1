#include "apply/weight_replacements.h"

#include <fmt/format.h>

#include "base/error.h"

namespace winnow {

void WeightReplacements::Add(const TensorSlice& slice, std::shared_ptr<const SafetensorsFile> file,
                             const std::string& name) {
  const TensorInfo& tensor = file->Get(name);
  if (tensor.dtype != slice.tensor->dtype || tensor.bytes != slice.bytes()) {
    throw ModelError(fmt::format("{}: tensor {} is {}, expected {} bytes of {}",
                                 file->path().string(), name, tensor.Describe(), slice.bytes(),
                                 DtypeName(slice.tensor->dtype)));
  }
  places_[{slice.tensor, slice.offset_bytes}] = {file.get(), tensor.file_offset, tensor.bytes};
  const SafetensorsFile* key = file.get();
  files_.emplace(key, std::move(file));
}

const WeightReplacements::Place* WeightReplacements::Find(const TensorInfo& tensor,
                                                          uint64_t offset) const {
  const auto found = places_.find({&tensor, offset});
  return found == places_.end() ? nullptr : &found->second;
}

}  // namespace winnow
