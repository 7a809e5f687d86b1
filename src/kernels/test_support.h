// What the kernel tests share: every attainable instruction set, random and exact data, weights
// that end where readable memory ends.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "kernels/targets.h"
#include "kernels/weight_matrix.h"

// Tests compare f32 results with double ones all the time.
#pragma GCC diagnostic ignored "-Wdouble-promotion"

namespace winnow {

// Unit roundoff of f32. A sum of k products, each step rounded once (FMA) or twice, is off by at
// most k * kUnit * sum |x w| to first order, whatever the order of the sum.
inline constexpr double kUnit = 0x1p-24;

// Sizes around the tiles (4, 6, 8, 12, 16, 32 lanes or rows) and the block of 256 columns.
inline const std::vector<int64_t> kSizes = {1,  3,  5,  6,  7,   8,   15,  16,  17,
                                            31, 33, 64, 65, 100, 255, 256, 257, 300};
inline const std::vector<Dtype> kDtypes = {Dtype::kF32, Dtype::kBF16, Dtype::kF16};

// Runs a test once per instruction set this CPU has, and leaves the best one selected.
class EveryIsa : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { SelectIsa(GetParam()); }
  void TearDown() override { SelectIsa(SupportedIsas().back()); }
};
#define WINNOW_EVERY_ISA(Suite)                                                      \
  INSTANTIATE_TEST_SUITE_P(Isa, Suite, testing::ValuesIn(::winnow::SupportedIsas()), \
                           [](const auto& isa) { return isa.param; })

inline std::vector<float> Normals(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// Whole numbers in [-4, 4]: every product and sum of them below 2^24 is exact in f32.
inline std::vector<float> SmallIntegers(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 9) - 4);
  return values;
}

// Memory of `bytes` whose last byte is the last readable one: reading past it ends the program.
class GuardedBytes {
 public:
  explicit GuardedBytes(size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    readable_ = (bytes + page - 1) / page * page;
    mapped_ = readable_ + page;
    void* mapping =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT_NE(mapping, MAP_FAILED);
    base_ = static_cast<std::byte*>(mapping);
    EXPECT_EQ(mprotect(base_ + readable_, page, PROT_NONE), 0);
    data_ = base_ + readable_ - bytes;
  }
  ~GuardedBytes() { munmap(base_, mapped_); }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;
  std::byte* data() { return data_; }
  float* floats() { return static_cast<float*>(static_cast<void*>(data_)); }

 private:
  size_t readable_ = 0, mapped_ = 0;
  std::byte* base_ = nullptr;
  std::byte* data_ = nullptr;
};

// A weight [rows, cols] stored as `dtype` (rounded to it), at the end of readable memory.
class StoredWeight {
 public:
  StoredWeight(const std::vector<float>& values, int64_t rows, int64_t cols, Dtype dtype)
      : bytes_(values.size() * (DtypeBits(dtype) / 8)) {
    EXPECT_EQ(values.size(), static_cast<size_t>(rows * cols));
    for (size_t i = 0; i < values.size(); ++i) {
      if (dtype == Dtype::kF32) {
        std::memcpy(bytes_.data() + 4 * i, &values[i], 4);
      } else {
        const uint16_t bits =
            dtype == Dtype::kBF16 ? Bf16FromFloat(values[i]) : F16FromFloat(values[i]);
        std::memcpy(bytes_.data() + 2 * i, &bits, 2);
      }
    }
    view_ = {.data = bytes_.data(), .rows = rows, .cols = cols, .dtype = dtype};
  }
  const WeightMatrix& view() const { return view_; }
  double at(int64_t row, int64_t col) const {
    return LoadAsFloat(view_.dtype, view_.data, static_cast<size_t>(row * view_.cols + col));
  }

 private:
  GuardedBytes bytes_;
  WeightMatrix view_;
};

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace winnow
