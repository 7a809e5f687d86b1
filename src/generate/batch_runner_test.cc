// Many sequences at once: the promise that none knows of the others, and that skipping, prefixes
// and records do what they say.
#include "generate/batch_runner.h"

#include <gtest/gtest.h>

#include <cstring>

#include "base/error.h"
#include "forward/test_support.h"

namespace winnow {
namespace {

using Row = std::vector<float>;

class BatchRunnerTest : public testing::TestWithParam<const char*> {
 protected:
  const Model model_ = Model::Open(GoldenFolder(GetParam()));
  const int64_t vocabulary_ = model_.config().vocab_size;

  BatchOptions Options(int64_t slots) { return {.slots = slots, .context_tokens = 64}; }
  std::vector<int32_t> Prompt(int64_t n, int32_t seed) {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < n; ++i) {
      ids.push_back(static_cast<int32_t>((i * i * 7 + i * seed + seed) % vocabulary_));
    }
    return ids;
  }
  static Row LastLogits(BatchRunner& runner, int64_t slot, std::span<const int32_t> ids) {
    Row last;
    runner.Prefill(slot, ids, 1, [&](int64_t, std::span<const float> row) {
      last.assign(row.begin(), row.end());
    });
    return last;
  }
  static int32_t Best(const Row& row) {
    return static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
  }
};

TEST_P(BatchRunnerTest, SequencesDoNotKnowOfEachOther) {
  // Five sequences decoded together by three threads, and each alone by one.
  ThreadPool three(3), one(1);
  BatchRunner together(model_, Options(5), three, {});
  BatchRunner alone(model_, Options(1), one, {});
  std::vector<std::vector<int32_t>> prompts;
  std::vector<Row> logits;
  for (int32_t i = 0; i < 5; ++i) {
    prompts.push_back(Prompt(3 + 5 * i, i + 1));
    logits.push_back(LastLogits(together, i, prompts.back()));
  }
  std::vector<std::vector<Row>> history(5);
  for (int step = 0; step < 4; ++step) {
    std::vector<DecodeEntry> entries;
    for (int64_t i = 4; i >= 0; --i) {
      if (step == 2 && i == 1) continue;  // not everyone is in every call
      entries.push_back({i, Best(logits[static_cast<size_t>(i)])});
    }
    std::vector<float> rows(entries.size() * static_cast<size_t>(vocabulary_));
    together.Decode(entries, rows);
    for (size_t at = 0; at < entries.size(); ++at) {
      const auto slot = static_cast<size_t>(entries[at].slot);
      const auto* row = rows.data() + at * static_cast<size_t>(vocabulary_);
      logits[slot].assign(row, row + vocabulary_);
      history[slot].push_back(logits[slot]);
    }
  }
  for (size_t i = 0; i < 5; ++i) {
    alone.Truncate(0, 0);
    Row row = LastLogits(alone, 0, prompts[i]);
    for (const Row& expected : history[i]) {
      const DecodeEntry entry = {0, Best(row)};
      alone.Decode(std::span(&entry, 1), row);
      EXPECT_EQ(std::memcmp(row.data(), expected.data(), row.size() * sizeof(float)), 0) << i;
    }
  }
}

TEST_P(BatchRunnerTest, ChunksAndPrefixesChangeNothing) {
  ThreadPool pool(2);
  BatchRunner runner(model_, Options(3), pool, {});
  const std::vector<int32_t> prompt = Prompt(40, 3);
  const Row whole = LastLogits(runner, 0, prompt);
  const std::span<const int32_t> ids(prompt);
  LastLogits(runner, 1, ids.first(17));
  LastLogits(runner, 1, ids.subspan(17, 1));
  EXPECT_EQ(LastLogits(runner, 1, ids.subspan(18)), whole);
  runner.CopyPrefix(0, 2, 25);
  EXPECT_EQ(runner.length(2), 25);
  EXPECT_EQ(LastLogits(runner, 2, ids.subspan(25)), whole);
  runner.Truncate(2, 30);
  EXPECT_EQ(LastLogits(runner, 2, ids.subspan(30)), whole);
}

TEST_P(BatchRunnerTest, EveryPositionHasTheReferencesLogits) {
  // Prefill's logits of all positions and, one by one, Decode's, against the whole pass.
  ThreadPool pool(2);
  BatchRunner runner(model_, Options(2), pool, {});
  const std::vector<int32_t> prompt = Prompt(20, 5);
  TokenSet tokens;
  tokens.Append(prompt);
  const ForwardTrace trace = RunForward(model_, tokens, {.logits = true});
  std::vector<Row> rows;
  runner.Prefill(0, prompt, 20, [&](int64_t index, std::span<const float> row) {
    EXPECT_EQ(index, static_cast<int64_t>(rows.size()));
    rows.emplace_back(row.begin(), row.end());
  });
  ASSERT_EQ(rows.size(), 20u);
  Row decoded = LastLogits(runner, 1, std::span(prompt).first(1));
  for (size_t t = 0; t < 20; ++t) {
    if (t > 0) {
      const DecodeEntry entry = {1, prompt[t]};
      runner.Decode(std::span(&entry, 1), decoded);
    }
    for (int64_t v = 0; v < vocabulary_; ++v) {
      const auto i = static_cast<size_t>(v);
      // Sums in another order: the goldens' own tolerance for logits.
      EXPECT_NEAR(rows[t][i], trace.logits[static_cast<int64_t>(t) * vocabulary_ + v], 1e-4);
      EXPECT_NEAR(decoded[i], rows[t][i], 1e-4);
    }
  }
}

// Thresholds in the last MoE layer alone change no router's input, so the ids with and without them
// are the same but for the mark.
TEST_P(BatchRunnerTest, SkippedExpertsKeepTheirIds) {
  const auto last = static_cast<size_t>(model_.config().MoeLayers().back());
  const int64_t k = model_.config().num_experts_per_tok;
  if (k < 2) GTEST_SKIP() << "the best expert is never skipped";
  ThreadPool pool(2);
  BatchOptions options = Options(1);
  BatchRunner plain(model_, options, pool, {});
  options.skip_betas.assign(static_cast<size_t>(model_.config().num_layers()), 0.0);
  options.skip_betas[last] = 1.0;  // all but the best, unless probabilities are equal
  BatchRunner skipping(model_, options, pool, {});
  plain.RecordExperts(true);
  skipping.RecordExperts(true);
  const auto check = [&](int64_t tokens) {
    const ExpertUse &all = plain.last_experts(), &some = skipping.last_experts();
    ASSERT_EQ(all.ids.size(), static_cast<size_t>(tokens * all.moe_layers * k));
    ASSERT_EQ(some.ids.size(), all.ids.size());
    int64_t skipped = 0;
    for (size_t i = 0; i < all.ids.size(); ++i) {
      EXPECT_EQ(ExpertOfSlot(some.ids[i]), all.ids[i]) << i;
      EXPECT_FALSE(winnow::IsSkipped(all.ids[i]));
      skipped += winnow::IsSkipped(some.ids[i]) ? 1 : 0;
    }
    EXPECT_EQ(skipped, tokens * (k - 1));
  };
  const std::vector<int32_t> prompt = Prompt(11, 3);
  LastLogits(plain, 0, prompt);
  LastLogits(skipping, 0, prompt);
  check(11);
  Row row(static_cast<size_t>(vocabulary_));
  for (const int32_t token : {5, 1, 7}) {
    const DecodeEntry entry = {0, token};
    plain.Decode(std::span(&entry, 1), row);
    skipping.Decode(std::span(&entry, 1), row);
    check(1);
  }
}

INSTANTIATE_TEST_SUITE_P(, BatchRunnerTest,
                         testing::Values("mixtral", "mixtral-bf16-fused", "qwen2_moe", "olmoe",
                                         "qwen3_moe-dense-layer", "deepseek-bf16"),
                         TestName);

}  // namespace
}  // namespace winnow
