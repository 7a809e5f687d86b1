// Blocks from one source of documents; BuildBlocks without the tokenizer's type and the shares, so
// that it can be tested with any function from text to ids.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "text/block_builder.h"  // BlockOptions
#include "text/text_source.h"    // TextSource, EncodeFunction, TokenSequences

namespace winnow {

// `options.num_blocks` blocks from `source`. Where documents are answers to prompts or
// conversations, the tokens of the prompts and of other speakers than the assistant have weight 0.
// UsageError if it gives fewer, or if no token counts.
TokenSequences BlocksFromDocuments(const TextSource& source, const EncodeFunction& encode,
                                   const BlockOptions& options,
                                   const ConversationEncoder& conversation = {});

// `num_blocks` divided in proportion to `shares`, remainders to the largest fractions, the first of
// equal ones first. Sums to `num_blocks`.
std::vector<int64_t> DivideByShares(int64_t num_blocks, const std::vector<double>& shares);

}  // namespace winnow
