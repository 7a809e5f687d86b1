#include "text/document_blocks.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "base/units.h"

namespace winnow {
namespace {

// As in NAEE's data/build.py: documents are tokenised in groups of 1,000 (the default batch of
// datasets.map) and each group's rest that fills no block is dropped.
constexpr int64_t kGroupDocuments = 1000;
constexpr int64_t kDocumentsPerBlock = 16;

// Bytes of each document, in the file's order.
std::vector<uint32_t> DocumentBytes(const TextSource& source, const std::string& field) {
  std::vector<uint32_t> bytes;
  ReadPromptedDocuments(source, field, [&](const Document& document) {
    bytes.push_back(static_cast<uint32_t>(document.text.size()));  // at most 256 MiB
    return true;
  });
  return bytes;
}

// The documents of the given numbers, in that order.
std::vector<Document> CollectDocuments(const TextSource& source, const std::string& field,
                                       std::span<const int64_t> numbers) {
  std::unordered_map<int64_t, size_t> wanted;
  for (size_t i = 0; i < numbers.size(); ++i) wanted.emplace(numbers[i], i);
  std::vector<Document> documents(numbers.size());
  int64_t number = 0;
  ReadPromptedDocuments(source, field, [&](Document document) {
    const auto found = wanted.find(number++);
    if (found != wanted.end()) {
      documents[found->second] = std::move(document);
      wanted.erase(found);
    }
    return !wanted.empty();
  });
  if (!wanted.empty()) {
    throw RuntimeError(fmt::format("{}: changed while it was being read", source.path.string()));
  }
  return documents;
}

// `bytes` of a longer document, from the line or word after a pseudo-random place on.
std::string_view Excerpt(std::string_view document, uint64_t bytes, uint64_t seed) {
  if (document.size() <= bytes) return document;
  // splitmix64: any fixed mixing will do.
  uint64_t x = seed + 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  const uint64_t start = x % (document.size() - bytes + 1);
  if (start == 0) return document.substr(0, bytes);
  size_t begin = document.find('\n', start);
  if (begin == std::string_view::npos || begin > start + bytes / 8) {
    begin = document.find(' ', start);
  }
  if (begin == std::string_view::npos || begin > start + bytes / 8)
    return document.substr(0, bytes);
  return document.substr(begin + 1, bytes);
}

// As many blocks as the documents give, at most those asked for. `cut`: a document gave an excerpt.
TokenSequences CutBlocks(const TextSource& source, const EncodeFunction& encode,
                         const ConversationEncoder& conversation, const BlockOptions& options,
                         const std::vector<uint32_t>& bytes, bool& cut, int64_t& documents_tried) {
  const auto num_documents = static_cast<int64_t>(bytes.size());
  std::vector<int64_t> order = NumpyPermutation(options.seed, num_documents);
  if (options.num_blocks < num_documents / kDocumentsPerBlock) {
    order.resize(static_cast<size_t>(options.num_blocks * kDocumentsPerBlock));
    order.shrink_to_fit();
  }

  const int64_t most_tokens = options.blocks_per_document * options.block_tokens;
  TokenSequences result;
  result.offsets.push_back(0);
  std::vector<int32_t> pending;
  std::vector<float> pending_weights;
  bool masked = false;
  size_t next = 0;
  // Only the first of the chosen documents are usually needed. They are fetched in rounds of about
  // the text that the missing blocks take, so that memory follows the result, not the source.
  while (result.size() < options.num_blocks && next < order.size()) {
    constexpr double kBytesPerToken = 6;  // more than usual, so that one round is usually enough
    const double missing = static_cast<double>(options.num_blocks - result.size()) *
                           static_cast<double>(options.block_tokens) * kBytesPerToken;
    size_t end = next;
    for (double round_bytes = 0; end < order.size() && round_bytes < missing; ++end) {
      const double used = bytes[static_cast<size_t>(order[end])];
      round_bytes += most_tokens > 0
                         ? std::min(used, static_cast<double>(most_tokens) * kBytesPerToken)
                         : used;
    }
    const std::vector<Document> documents =
        CollectDocuments(source, options.field, std::span(order).subspan(next, end - next));
    for (const Document& document : documents) {
      if (result.size() == options.num_blocks) break;
      if (next % kGroupDocuments == 0) {
        pending.clear();
        pending_weights.clear();
      }
      ++next;
      const int64_t number = order[next - 1];
      CountedIds tokens;
      if (most_tokens > 0 && document.prompt_bytes == 0 && !document.is_conversation) {
        tokens.ids = encode(Excerpt(document.text, static_cast<uint64_t>(most_tokens) * 8,
                                    options.seed ^ static_cast<uint64_t>(number)),
                            true);
      } else {
        tokens = EncodeDocument(document, encode, conversation);
      }
      masked = masked || !tokens.weights.empty();
      tokens.weights.resize(tokens.ids.size(), 1.0f);
      if (most_tokens > 0 && static_cast<int64_t>(tokens.ids.size()) > most_tokens) {
        tokens.ids.resize(static_cast<size_t>(most_tokens));
        tokens.weights.resize(static_cast<size_t>(most_tokens));
        cut = true;
      }
      pending.insert(pending.end(), tokens.ids.begin(), tokens.ids.end());
      pending_weights.insert(pending_weights.end(), tokens.weights.begin(), tokens.weights.end());
      const int64_t whole = std::min(static_cast<int64_t>(pending.size()) / options.block_tokens,
                                     options.num_blocks - result.size());
      for (int64_t block = 0; block < whole; ++block) {
        result.offsets.push_back(result.offsets.back() + options.block_tokens);
      }
      const auto used = pending.begin() + whole * options.block_tokens;
      result.ids.insert(result.ids.end(), pending.begin(), used);
      pending.erase(pending.begin(), used);
      const auto used_weights = pending_weights.begin() + whole * options.block_tokens;
      result.weights.insert(result.weights.end(), pending_weights.begin(), used_weights);
      pending_weights.erase(pending_weights.begin(), used_weights);
    }
  }
  documents_tried = std::ssize(order);
  if (!masked) result.weights.clear();
  return result;
}

}  // namespace

TokenSequences BlocksFromDocuments(const TextSource& source, const EncodeFunction& encode,
                                   const BlockOptions& options,
                                   const ConversationEncoder& conversation) {
  const std::vector<uint32_t> bytes = DocumentBytes(source, options.field);
  BlockOptions attempt = options;
  for (;; attempt.blocks_per_document *= 2) {
    bool cut = false;
    int64_t tried = 0;
    TokenSequences result = CutBlocks(source, encode, conversation, attempt, bytes, cut, tried);
    if (result.size() == options.num_blocks) {
      if (!result.weights.empty() &&
          std::find(result.weights.begin(), result.weights.end(), 1.0f) == result.weights.end()) {
        throw UsageError(
            fmt::format("{}: the blocks hold prompts alone, no answer", source.path.string()),
            "give more blocks, or longer ones (--block)");
      }
      return result;
    }
    if (cut && attempt.blocks_per_document < options.num_blocks) continue;
    std::string hint = "shorten the blocks (--block), or give more text";
    if (result.size() > 0) {
      hint = fmt::format(
          "give --blocks {} or less for this text, shorter blocks (--block), or more "
          "text{}",
          result.size(),
          tried < std::ssize(bytes)
              ? fmt::format("; of short documents only {} a block are tried", kDocumentsPerBlock)
              : "");
    }
    throw UsageError(fmt::format("{}: {} documents give {} blocks of {} tokens, {} are wanted",
                                 source.path.string(), FormatCount(static_cast<uint64_t>(tried)),
                                 result.size(), options.block_tokens, options.num_blocks),
                     hint);
  }
}

std::vector<int64_t> DivideByShares(int64_t num_blocks, const std::vector<double>& shares) {
  const double total = std::accumulate(shares.begin(), shares.end(), 0.0);
  std::vector<int64_t> parts(shares.size());
  std::vector<double> fractions(shares.size());
  int64_t left = num_blocks;
  for (size_t i = 0; i < shares.size(); ++i) {
    const double exact = static_cast<double>(num_blocks) * (shares[i] / total);
    parts[i] = static_cast<int64_t>(std::floor(exact));
    fractions[i] = exact - std::floor(exact);
    left -= parts[i];
  }
  std::vector<size_t> by_fraction(shares.size());
  std::iota(by_fraction.begin(), by_fraction.end(), size_t{0});
  std::stable_sort(by_fraction.begin(), by_fraction.end(),
                   [&](size_t a, size_t b) { return fractions[a] > fractions[b]; });
  for (size_t i = 0; left > 0; i = (i + 1) % by_fraction.size(), --left) ++parts[by_fraction[i]];
  return parts;
}

}  // namespace winnow
