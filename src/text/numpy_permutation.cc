// NumPy's default_rng(seed).permutation(n), bit for bit: numpy/random/bit_generator.pyx
// (SeedSequence), src/pcg64 (PCG64: O'Neill's XSL-RR 128/64), src/distributions/distributions.c
// (random_interval) and Generator.shuffle. NEP 19 keeps such streams stable in practice.
#include <array>
#include <bit>
#include <numeric>
#include <utility>

#include "text/block_builder.h"

namespace winnow {
namespace {

__extension__ using uint128 = unsigned __int128;

uint128 Join(uint64_t high, uint64_t low) {
  return (uint128{high} << 64) | low;
}

// SeedSequence(seed).generate_state(4, uint64).
std::array<uint64_t, 4> SeedState(uint64_t seed) {
  constexpr int kPool = 4;
  uint32_t hash_constant = 0x43b0d7e5u;
  const auto hash_mix = [&](uint32_t value) {
    value ^= hash_constant;
    hash_constant *= 0x931e8875u;
    value *= hash_constant;
    return value ^ (value >> 16);
  };
  const auto mix = [](uint32_t x, uint32_t y) {
    const uint32_t result = 0xca01f9ddu * x - 0x4973f715u * y;
    return result ^ (result >> 16);
  };
  const std::array<uint32_t, kPool> entropy = {static_cast<uint32_t>(seed),
                                               static_cast<uint32_t>(seed >> 32), 0, 0};
  std::array<uint32_t, kPool> pool{};
  for (int i = 0; i < kPool; ++i) pool[i] = hash_mix(entropy[i]);
  for (int from = 0; from < kPool; ++from) {
    for (int to = 0; to < kPool; ++to) {
      if (from != to) pool[to] = mix(pool[to], hash_mix(pool[from]));
    }
  }
  std::array<uint32_t, 8> words{};
  uint32_t output_constant = 0x8b51f9ddu;
  for (int i = 0; i < 8; ++i) {
    uint32_t value = pool[i % kPool] ^ output_constant;
    output_constant *= 0x58f38dedu;
    value *= output_constant;
    words[i] = value ^ (value >> 16);
  }
  std::array<uint64_t, 4> state{};
  for (int i = 0; i < 4; ++i) state[i] = words[2 * i] | (uint64_t{words[2 * i + 1]} << 32);
  return state;
}

class Pcg64 {
 public:
  explicit Pcg64(uint64_t seed) {
    const std::array<uint64_t, 4> words = SeedState(seed);
    increment_ = (Join(words[2], words[3]) << 1) | 1;
    Step();
    state_ += Join(words[0], words[1]);
    Step();
  }
  uint64_t Next64() {
    Step();
    const auto folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
    return std::rotr(folded, static_cast<int>(state_ >> 122));
  }
  // The halves of a 64-bit draw, low half first.
  uint32_t Next32() {
    if (std::exchange(has_half_, !has_half_)) return half_;
    const uint64_t both = Next64();
    half_ = static_cast<uint32_t>(both >> 32);
    return static_cast<uint32_t>(both);
  }
  // Uniform on [0, max], by masking and rejection.
  uint64_t Interval(uint64_t max) {
    if (max == 0) return 0;
    const uint64_t mask = ~uint64_t{0} >> std::countl_zero(max);
    uint64_t value = 0;
    do {
      value = (max <= UINT32_MAX ? uint64_t{Next32()} : Next64()) & mask;
    } while (value > max);
    return value;
  }

 private:
  void Step() {
    constexpr uint64_t kHigh = 0x2360ed051fc65da4u;
    constexpr uint64_t kLow = 0x4385df649fccf645u;
    state_ = state_ * Join(kHigh, kLow) + increment_;
  }
  uint128 state_ = 0;
  uint128 increment_ = 0;
  uint32_t half_ = 0;
  bool has_half_ = false;
};

}  // namespace

std::vector<int64_t> NumpyPermutation(uint64_t seed, int64_t n) {
  std::vector<int64_t> result(static_cast<size_t>(n));
  std::iota(result.begin(), result.end(), int64_t{0});
  Pcg64 generator(seed);
  for (int64_t i = n - 1; i > 0; --i) {
    const uint64_t other = generator.Interval(static_cast<uint64_t>(i));
    std::swap(result[static_cast<size_t>(i)], result[other]);
  }
  return result;
}

}  // namespace winnow
