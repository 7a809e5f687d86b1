// Number formats of stored tensors, as named by safetensors. Weights keep their stored format in
// memory and are widened to f32 a tile at a time inside kernels/.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace winnow {

enum class Dtype : uint8_t {
  kBool,
  kF4,
  kF6E2M3,
  kF6E3M2,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kF8E8M0,
  kF8E4M3FNUZ,
  kF8E5M2FNUZ,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kC64,
  kF64,
  kI64,
  kU64,
};

// "BF16" -> kBF16; nothing if the name is not one safetensors defines.
std::optional<Dtype> DtypeFromName(std::string_view name);
std::string_view DtypeName(Dtype dtype);
// Bits per element (F4 has 4), so that sizes of packed formats are exact.
uint32_t DtypeBits(Dtype dtype);
// Formats Winnow computes with: F32, F16, BF16.
bool IsComputeDtype(Dtype dtype);

inline float FloatFromBf16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}
// Round to nearest even; NaN stays NaN.
inline uint16_t Bf16FromFloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
float FloatFromF16(uint16_t bits);
uint16_t F16FromFloat(float value);

// One element of a F32/F16/BF16 array, any alignment.
float LoadAsFloat(Dtype dtype, const std::byte* data, size_t index);
// The other way, rounded to the nearest.
void StoreFloat(Dtype dtype, float value, std::byte* data, size_t index);

}  // namespace winnow
