// Number formats, sizes, strict JSON, files and the thread pool.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <string>

#include "base/aligned_buffer.h"
#include "base/dtype.h"
#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/thread_pool.h"
#include "base/units.h"

namespace winnow {
namespace {

TEST(Dtype, HalfRoundTripsEveryBitPattern) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = FloatFromF16(half);
    if (std::isnan(value)) continue;
    EXPECT_EQ(F16FromFloat(value), half) << bits;
  }
  EXPECT_EQ(FloatFromF16(0x3c00), 1.0f);
  EXPECT_EQ(FloatFromF16(0x0001), 0x1p-24f);
  EXPECT_EQ(F16FromFloat(65520.0f), 0x7c00);  // first value that rounds to infinity
}

TEST(Dtype, Bf16RoundsToNearestEven) {
  EXPECT_EQ(Bf16FromFloat(1.0f), 0x3f80);
  EXPECT_EQ(Bf16FromFloat(std::bit_cast<float>(0x3f808000u)), 0x3f80);  // tie, even below
  EXPECT_EQ(Bf16FromFloat(std::bit_cast<float>(0x3f818000u)), 0x3f82);  // tie, even above
  EXPECT_TRUE(std::isnan(FloatFromBf16(Bf16FromFloat(std::numeric_limits<float>::quiet_NaN()))));
}

TEST(Units, ParsesPowersOf1024) {
  EXPECT_EQ(ParseBytes("4G", "--max-memory"), uint64_t{4} << 30);
  EXPECT_EQ(ParseBytes("1.5KiB", "x"), 1536u);
  EXPECT_EQ(ParseBytes("10", "x"), 10u);
  EXPECT_THROW(ParseBytes("4X", "x"), UsageError);
  EXPECT_THROW(ParseBytes("-1G", "x"), UsageError);
  EXPECT_THROW(ParseBytes("", "x"), UsageError);
  EXPECT_EQ(FormatBytes(1536), "1.5 KiB");
  EXPECT_EQ(FormatCount(1234567), "1,234,567");
}

TEST(Json, RefusesDuplicatesDepthAndBadUtf8) {
  EXPECT_EQ(ParseJson(R"({"a":[1,2]})", "f")["a"][1], 2);
  EXPECT_THROW(ParseJson(R"({"a":1,"a":2})", "f"), ModelError);
  EXPECT_THROW(ParseJson(R"({"a":1} x)", "f"), ModelError);
  EXPECT_THROW(ParseJson(std::string("{\"a\":1}\0junk", 12), "f"), ModelError);
  EXPECT_THROW(ParseJson("{\"a\":\"\xff\"}", "f"), ModelError);
  EXPECT_THROW(ParseJson(std::string(100, '[') + std::string(100, ']'), "f"), ModelError);
}

TEST(File, WritesAtomicallyAndReadsBack) {
  const fs::path folder = fs::temp_directory_path() / "winnow_base_test";
  fs::create_directories(folder);
  WriteFileAtomically(folder / "a.txt", "hello");
  EXPECT_EQ(ReadTextFile(folder / "a.txt"), "hello");
  EXPECT_THROW(ReadTextFile(folder / "a.txt", 2), ModelError);
  EXPECT_THROW(File::OpenRead(folder / "absent"), RuntimeError);
  EXPECT_THROW(File::OpenRead(folder), RuntimeError);
  const File source = File::OpenRead(folder / "a.txt");
  const File copy = File::Create(folder / "b.txt");
  copy.CopyFrom(source, 1, 0, 4);
  EXPECT_EQ(ReadTextFile(folder / "b.txt"), "ello");
  fs::remove_all(folder);
}

TEST(Hash, LengthIsPartOfTheFingerprint) {
  Fingerprint a, b;
  a.Add("ab");
  a.Add("c");
  b.Add("a");
  b.Add("bc");
  EXPECT_NE(a.Hex(), b.Hex());
  EXPECT_EQ(a.Hex().size(), 32u);
}

// "hg" in the flags of a mapping: its pages may be huge.
bool AsksForHugePages(const void* memory) {
  std::ifstream maps("/proc/self/smaps");
  const auto address = reinterpret_cast<uintptr_t>(memory);
  bool inside = false;
  for (std::string line; std::getline(maps, line);) {
    uintptr_t begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) {
      inside = begin <= address && address < end;
    } else if (inside && line.rfind("VmFlags:", 0) == 0) {
      return line.find(" hg") != std::string::npos;
    }
  }
  return false;
}

TEST(AlignedBuffer, LargeOnesAskForHugePages) {
  if (!std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled")) {
    GTEST_SKIP() << "a kernel without huge pages";
  }
  AlignedBuffer<float> large(4 << 20), small(1000);
  EXPECT_TRUE(AsksForHugePages(large.data() + large.size() / 2));
  EXPECT_FALSE(AsksForHugePages(small.data()));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(large.data()) % 64, 0u);
}

TEST(ThreadPool, RunsEveryTaskOnceAndRethrows) {
  for (int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 50; ++round) {
      std::vector<std::atomic<int>> hits(101);
      pool.Run(101, [&](int64_t task, int worker) {
        ASSERT_LT(worker, threads);
        ++hits[static_cast<size_t>(task)];
      });
      for (const auto& hit : hits) EXPECT_EQ(hit.load(), 1);
    }
    EXPECT_THROW(pool.Run(10,
                          [](int64_t task, int) {
                            if (task == 3) throw UsageError("x");
                          }),
                 UsageError);
    int after = 0;
    pool.Run(1, [&](int64_t, int) { ++after; });
    EXPECT_EQ(after, 1);
  }
}

// Loops of a few tasks, as of a decoded token: most are over before every worker came, and what it
// missed must not run twice or with the next loop's body. More threads than cores, so that some are
// late.
TEST(ThreadPool, LateWorkersMissALoopButNoTask) {
  ThreadPool pool(8);
  int64_t sum = 0, expected = 0;
  std::array<int64_t, 5> done{};
  for (int64_t round = 0; round < 3000; ++round) {
    const int64_t tasks = 2 + round % 4;
    pool.Run(tasks, [&, round](int64_t task, int) { done[static_cast<size_t>(task)] = round + 1; });
    for (int64_t task = 0; task < tasks; ++task) sum += done[static_cast<size_t>(task)];
    expected += tasks * (round + 1);
  }
  EXPECT_EQ(sum, expected);
}

}  // namespace
}  // namespace winnow
