#include "text/block_builder.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "text/document_blocks.h"

namespace winnow {
namespace {

constexpr int64_t kMaxBlocks = 10'000'000;
constexpr int64_t kMaxBlockTokens = 10'000'000;

void CheckOptions(const BlockOptions& options) {
  if (options.num_blocks < 1 || options.num_blocks > kMaxBlocks) {
    throw UsageError(
        fmt::format("{} blocks are wanted, expected 1 to {}", options.num_blocks, kMaxBlocks));
  }
  if (options.block_tokens < 1 || options.block_tokens > kMaxBlockTokens) {
    throw UsageError(fmt::format("blocks of {} tokens are wanted, expected 1 to {}",
                                 options.block_tokens, kMaxBlockTokens));
  }
}

// Two files of one name in different folders stay apart in reports.
std::string UniqueName(const std::string& name, const std::vector<SourceBlocks>& taken) {
  std::string unique = name;
  const auto is_taken = [&] {
    return std::any_of(taken.begin(), taken.end(),
                       [&](const SourceBlocks& other) { return other.name == unique; });
  };
  for (int number = 2; is_taken(); ++number) unique = fmt::format("{}-{}", name, number);
  return unique;
}

}  // namespace

std::vector<SourceBlocks> BuildBlocks(const std::vector<TextSource>& sources,
                                      const Tokenizer* tokenizer, const BlockOptions& options,
                                      const ConversationEncoder& conversation) {
  std::vector<double> shares;
  for (const TextSource& source : sources) {
    if (!source.is_token_ids) shares.push_back(source.share);
  }
  std::vector<int64_t> parts;
  if (!shares.empty()) {
    CheckOptions(options);
    if (tokenizer == nullptr) throw RuntimeError("text needs a tokenizer to become blocks");
    parts = DivideByShares(options.num_blocks, shares);
  }
  std::vector<SourceBlocks> result;
  size_t next_part = 0;
  for (const TextSource& source : sources) {
    SourceBlocks blocks{UniqueName(source.name, result), {}};
    if (source.is_token_ids) {
      blocks.sequences = ReadTokenIds(source.path);
    } else {
      BlockOptions part = options;
      part.num_blocks = parts[next_part++];
      if (part.num_blocks == 0) {
        throw UsageError(fmt::format("{}: its share of {} blocks is none", source.path.string(),
                                     options.num_blocks),
                         "ask for more blocks, leave the source out or raise its share");
      }
      const auto encode = [&](std::string_view text, bool with_special) {
        return tokenizer->Encode(text, with_special);
      };
      blocks.sequences = BlocksFromDocuments(source, encode, part, conversation);
    }
    result.push_back(std::move(blocks));
  }
  return result;
}

}  // namespace winnow
