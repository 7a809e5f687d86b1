// Size arithmetic that refuses to wrap. Every product or sum of numbers that came from a file or a
// flag goes through these; `what` names the quantity in the message.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"  // ModelError

namespace winnow {

inline uint64_t CheckedMul(uint64_t a, uint64_t b, std::string_view what) {
  uint64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) {
    throw ModelError(std::string(what) + ": size does not fit in 64 bits");
  }
  return result;
}

inline uint64_t CheckedAdd(uint64_t a, uint64_t b, std::string_view what) {
  uint64_t result = 0;
  if (__builtin_add_overflow(a, b, &result)) {
    throw ModelError(std::string(what) + ": size does not fit in 64 bits");
  }
  return result;
}

// a / b rounded up, of checked sizes: a >= 0, b > 0.
constexpr int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace winnow
