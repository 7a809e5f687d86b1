// From documents to calibration blocks, as NAEE builds them (docs/METHODS.md, arXiv 2402.14800 and
// its data/build.py): documents permuted with NumPy's default_rng(seed).permutation(N), the first
// min(16 n, N) kept, each tokenised with its special tokens (BOS), concatenated in groups of 1,000
// documents, each group cut into blocks with its tail dropped, the first n blocks kept.
// Deterministic for a seed on every machine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "text/text_source.h"     // TextSource, TokenSequences, ConversationEncoder
#include "tokenizer/tokenizer.h"  // Tokenizer

namespace winnow {

// NumPy's default_rng(seed).permutation(n): SeedSequence, PCG64, and its bounded-integer shuffle.
std::vector<int64_t> NumpyPermutation(uint64_t seed, int64_t n);

struct BlockOptions {
  int64_t num_blocks = 128;  // over all sources, divided by their shares
  int64_t block_tokens = 512;
  uint64_t seed = 42;
  // Blocks one document gives at most (0: no limit, as published). A longer one gives an excerpt
  // from a place that the seed decides, so that the blocks come from more documents. Doubled until
  // there are blocks enough.
  int64_t blocks_per_document = 0;
  std::string field = "text";  // of JSONL
};

// One entry per source, in the order given. UsageError if a source is too short, saying how many
// blocks it gives. Id-file sources are taken row by row in order, all of them, and ignore the
// options.
struct SourceBlocks {
  std::string name;
  TokenSequences sequences;
};
// `tokenizer` may be null if every source is an id file, `conversation` empty if conversations
// (lines with `messages`) are to be refused.
std::vector<SourceBlocks> BuildBlocks(const std::vector<TextSource>& sources,
                                      const Tokenizer* tokenizer, const BlockOptions& options,
                                      const ConversationEncoder& conversation = {});

}  // namespace winnow
