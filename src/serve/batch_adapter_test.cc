// The scheduler's promise with a real model behind it: answers and scores are bitwise those of the
// request alone, whatever else runs and whatever the slots held.
#include "serve/batch_adapter.h"

#include <gtest/gtest.h>

#include "serve/answer.h"
#include "serve/test_support.h"

namespace winnow {
namespace {

class SampleModel {
 public:
  explicit SampleModel(SkipBetas betas = {})
      : runner_(model_, {.slots = 3, .context_tokens = 96, .skip_betas = std::move(betas)}, pool_,
                {}) {}
  // All requests, `together` at a time, through a scheduler of its own.
  std::vector<Collected> Run(const std::vector<SequenceSpec>& specs, size_t together,
                             bool reuse_prefixes) {
    for (int64_t slot = 0; slot < runner_.slots(); ++slot) runner_.Truncate(slot, 0);
    SchedulerOptions options;
    options.chunk_tokens = 8;
    options.reuse_prefixes = reuse_prefixes;
    options.vocabulary.moe_layers = 4;
    Metrics metrics{ServedSizes{}};
    Scheduler scheduler(adapter_, SampleTokenizer(), options, metrics);
    std::vector<Collected> all;
    for (size_t first = 0; first < specs.size(); first += together) {
      std::vector<std::shared_ptr<Generation>> generations;
      for (size_t i = first; i < std::min(specs.size(), first + together); ++i) {
        generations.push_back(scheduler.Submit({specs[i]}, {}));
      }
      while (scheduler.Step()) {
      }
      for (const auto& generation : generations) all.push_back(Collect(*generation)[0]);
    }
    EXPECT_EQ(metrics.counts().prefix_hits > 0, reuse_prefixes);
    return all;
  }
  // The report on experts in the answer to one request.
  OrderedJson Experts(const SequenceSpec& spec) {
    SchedulerOptions options;
    options.vocabulary.moe_layers = 4;
    Metrics metrics{ServedSizes{}};
    Scheduler scheduler(adapter_, SampleTokenizer(), options, metrics);
    const auto generation = scheduler.Submit({spec}, {});
    while (scheduler.Step()) {
    }
    AnswerForm form;
    form.report_experts = true;
    form.moe_layers = 4;
    Answer answer(form, 1, SampleTokenizer());
    while (const auto event = generation->Next(std::chrono::milliseconds(0))) answer.Add(*event);
    return answer.Whole()["choices"][0]["winnow"];
  }

 private:
  Model model_ = Model::Open(fs::path(WINNOW_SOURCE_DIR) / "examples/sample-mixtral");
  ThreadPool pool_{2};
  BatchRunner runner_;
  BatchAdapter adapter_{runner_};
};

TEST(BatchAdapter, AnswersDoNotDependOnCompanyOrCache) {
  std::vector<SequenceSpec> specs;
  uint64_t seed = 1;
  for (const char* text : {"The old man and the sea were", "The old man and the dog", "The old man",
                           "The old man and the sea were there for a long time before anybody came",
                           "def main(): return 1", "The old man and the sea were"}) {
    SequenceSpec spec;
    spec.prompt = SampleTokenizer().Encode(text, true);
    spec.max_tokens = 9;
    spec.sampling = {.temperature = 0.9f, .seed = ++seed};
    spec.top_logprobs = 3;
    spec.score_prompt = seed % 2 == 0;
    specs.push_back(spec);
  }
  SampleModel model;
  const std::vector<Collected> expected = model.Run(specs, 1, false);
  for (const size_t together : {1, 2, 6}) {
    const std::vector<Collected> got = model.Run(specs, together, true);
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].tokens, expected[i].tokens) << together << " " << i;
      EXPECT_EQ(got[i].text, expected[i].text);
      EXPECT_EQ(got[i].scores, expected[i].scores);
      EXPECT_EQ(got[i].prompt_scores, expected[i].prompt_scores);
    }
  }
}

// Thresholds in the last layer alone change no router's input, and the bias leaves one token to be
// drawn, so both models select the same experts and differ in which of them run.
TEST(BatchAdapter, UsedAndSkippedExpertsAreTheRoutersTopK) {
  SequenceSpec spec;
  spec.prompt = SampleTokenizer().Encode("The old man and the sea", true);
  spec.max_tokens = 12;
  spec.stop_at_eos = false;
  spec.rules.logit_bias = {{100, 1e6f}};
  const OrderedJson all = SampleModel().Experts(spec);
  const OrderedJson some = SampleModel({0, 0, 0, 0.7}).Experts(spec);
  ASSERT_EQ(all["experts"].size(), 12u);
  ASSERT_EQ(some["experts"].size(), 12u);
  size_t skipped = 0;
  for (size_t token = 0; token < 12; ++token) {
    for (size_t layer = 0; layer < 4; ++layer) {
      EXPECT_TRUE(all["skipped"][token][layer].empty());
      OrderedJson selected = some["experts"][token][layer];
      for (const OrderedJson& id : some["skipped"][token][layer]) {
        EXPECT_EQ(layer, 3u);
        selected.push_back(id);
        ++skipped;
      }
      EXPECT_EQ(selected, all["experts"][token][layer]) << token << " " << layer;
    }
  }
  EXPECT_GT(skipped, 0u);
  EXPECT_LT(skipped, 12u);
}

}  // namespace
}  // namespace winnow
