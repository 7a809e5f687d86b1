// One tokenizer used by several threads at once; apart from the other tests because they are slow
// under ThreadSanitizer.
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "base/json.h"
#include "tokenizer/tokenizer.h"

namespace winnow {
namespace {

TEST(TokenizerThreads, GetTheReferenceIds) {
  for (const char* style : {"mixtral", "qwen"}) {
    const fs::path folder = fs::path(WINNOW_TEST_DATA) / "tokenizers" / style;
    const Tokenizer tokenizer = Tokenizer::Load(folder);
    const std::string golden = ReadTextFile(folder / "golden.jsonl");
    std::vector<Json> lines;
    for (size_t begin = 0, end; lines.size() < 100 && begin < golden.size(); begin = end + 1) {
      end = golden.find('\n', begin);
      if (end == std::string::npos) break;
      lines.push_back(ParseJson(golden.substr(begin, end - begin), style));
    }
    ASSERT_GE(lines.size(), 50u);
    std::vector<int> wrong(4, 0);
    std::vector<std::thread> threads;
    for (int& count : wrong) {
      threads.emplace_back([&] {
        for (const Json& line : lines) {
          count += tokenizer.Encode(line["text"].get<std::string>(), true) !=
                   line["ids_special"].get<std::vector<int32_t>>();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, std::vector<int>(4, 0));
  }
}

}  // namespace
}  // namespace winnow
