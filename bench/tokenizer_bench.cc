// How fast texts become token ids, on one thread: megabytes of UTF-8 per second, CPU time, best of
// the rounds. Beside it, how many texts the ids decode to: some styles change text on purpose.
//
//   tokenizer_bench [--rounds=N] TEXT... -- FOLDER...
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.h"
#include "bench_main.h"
#include "machine_peak.h"
#include "text/text_source.h"
#include "tokenizer/tokenizer.h"

namespace winnow {
namespace {

constexpr const char* kDefaultTexts[] = {"prose", "docs", "code", "math", "other"};
constexpr const char* kDefaultFolders[] = {"deepseek-llm", "deepseek-v3",       "gpt_oss", "llama3",
                                           "mixtral",      "mixtral-metaspace", "olmoe",   "qwen"};

int Main(int argc, char** argv) {
  int rounds = 3;
  std::vector<std::string> texts, folders;
  bool in_folders = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.starts_with("--rounds=")) {
      rounds = std::atoi(argument.c_str() + 9);
    } else if (argument == "--") {
      in_folders = true;
    } else if (!argument.starts_with("--")) {
      (in_folders ? folders : texts).push_back(argument);
    }
  }
  const std::string root = WINNOW_SOURCE_DIR;
  if (texts.empty()) {
    for (const char* name : kDefaultTexts) {
      texts.push_back(root + "/examples/text/" + name + ".calib.txt.xz");
    }
  }
  if (folders.empty()) {
    for (const char* name : kDefaultFolders) {
      folders.push_back(root + "/tests/data/tokenizers/" + name);
    }
  }
  std::vector<std::string> documents;
  double bytes = 0;
  for (const std::string& path : texts) {
    ReadDocuments(ParseTextSource(path), "text", [&](std::string document) {
      bytes += static_cast<double>(document.size());
      documents.push_back(std::move(document));
      return true;
    });
  }
  std::printf("tokenizer_bench: %.1f MB in %zu documents, one thread\n", bytes * 1e-6,
              documents.size());
  for (const std::string& folder : folders) {
    const Tokenizer tokenizer = Tokenizer::Load(folder);
    size_t tokens = 0, round_trips = 0;
    for (const std::string& document : documents) {
      round_trips += tokenizer.Decode(tokenizer.Encode(document, false), false) == document ? 1 : 0;
    }
    double best = 1e30;
    for (int round = 0; round < rounds; ++round) {
      best = std::min(best, SecondsOf(
                                [&] {
                                  tokens = 0;
                                  for (const std::string& document : documents) {
                                    tokens += tokenizer.Encode(document, false).size();
                                  }
                                },
                                true));
    }
    std::printf("%-20s %6.1f MB/s, %.2f bytes a token, %zu of %zu documents decode to themselves\n",
                folder.substr(folder.rfind('/') + 1).c_str(), bytes * 1e-6 / best,
                bytes / static_cast<double>(tokens), round_trips, documents.size());
  }
  return 0;
}

}  // namespace
}  // namespace winnow

int main(int argc, char** argv) {
  return winnow::RunBenchmark(winnow::Main, argc, argv);
}
