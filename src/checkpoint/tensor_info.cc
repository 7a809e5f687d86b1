#include "checkpoint/tensor_info.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace winnow {

std::string TensorInfo::Describe() const {
  return fmt::format("{} [{}]", DtypeName(dtype), fmt::join(shape, ", "));
}

}  // namespace winnow
