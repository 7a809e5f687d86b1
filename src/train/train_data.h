// Training rows: from token ids with masks (as published programs prepare them) or from texts, and
// the order in which steps take them. Called by cli/; TrainRun gets rows and steps.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"            // fs
#include "text/text_source.h"     // TextSource, ConversationEncoder
#include "tokenizer/tokenizer.h"  // Tokenizer
#include "train/train_batch.h"    // TrainBatch

namespace winnow {

struct TrainRow {
  std::vector<int32_t> ids;
  std::vector<float> weights = {};  // what predicting each token counts for; empty: 1 each
  std::vector<uint8_t> mask = {};   // 0: padding; empty: none
};

// `input_ids` [rows, T] with `attention_mask` or a `mask` of what tokens count for, both optional.
// Without keep_padding masked positions are cut off: nothing is learnt from them.
std::vector<TrainRow> ReadTrainRows(const fs::path& path, bool keep_padding);

struct TrainTextOptions {
  int64_t block_tokens = 512;
  std::string field = "text";
  bool prompt_counts = false;             // prompts are learnt too
  std::optional<int32_t> end = {};        // behind each answer to a prompt
  ConversationEncoder conversation = {};  // of lines with `messages`; empty: they are refused
};
// Texts laid end to end, each with its first tokens, cut into rows (a shorter one at the end only
// if it is the only one); prompts with answers and conversations are a row each, cut at its end.
std::vector<TrainRow> RowsOfText(const TextSource& source, const Tokenizer& tokenizer,
                                 const TrainTextOptions& options);

// Row numbers that are held out: every 1 / share-th one. The same for the same number of rows.
std::vector<int32_t> HeldOutRows(int64_t num_rows, double share);

// Row numbers of each step. Each epoch goes once through the rows in an order of its own that the
// seed decides; a last, smaller batch is a step too. `most_steps` 0: no limit.
std::vector<std::vector<int32_t>> ShuffledSteps(const std::vector<int32_t>& rows, int64_t batch,
                                                int64_t epochs, uint64_t seed, int64_t most_steps);
// A file with a list of row numbers for each step. ModelError for anything else, UsageError for
// rows that do not exist.
std::vector<std::vector<int32_t>> ReadStepOrder(const fs::path& path, int64_t num_rows);

// The rows as a batch: each position predicts the next token of its row.
TrainBatch MakeBatch(const std::vector<TrainRow>& rows, std::span<const int32_t> numbers);

}  // namespace winnow
