// Pieces that the tests of this folder share: the bundled sample's tokenizer, a fake model with its
// vocabulary, and a scheduler around them that the test drives turn by turn.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "serve/api_service.h"
#include "serve/fake_runner.h"
#include "serve/scheduler.h"

namespace winnow {

inline const Tokenizer& SampleTokenizer() {
  static const Tokenizer tokenizer =
      Tokenizer::Load(fs::path(WINNOW_SOURCE_DIR) / "examples/sample-mixtral");
  return tokenizer;
}

inline FakeRunner::Options SampleRunner(int64_t slots = 2, int64_t context_tokens = 64) {
  FakeRunner::Options options;
  options.slots = slots;
  options.context_tokens = context_tokens;
  options.vocab_size = SampleTokenizer().vocab_size();
  return options;
}

inline SchedulerOptions SampleScheduling() {
  SchedulerOptions options;
  options.chunk_tokens = 4;
  options.vocabulary.moe_layers = 2;
  return options;
}

struct Bench {
  explicit Bench(FakeRunner::Options runner_options = SampleRunner(),
                 SchedulerOptions scheduling = SampleScheduling())
      : runner(std::move(runner_options)),
        scheduler(runner, SampleTokenizer(), std::move(scheduling), metrics) {}
  // Until nothing is left to do.
  void RunAll() {
    while (scheduler.Step()) {
    }
  }

  FakeRunner runner;
  Metrics metrics{ServedSizes{}};
  Scheduler scheduler;
};

// Everything one sequence yielded.
struct Collected {
  std::string text;
  std::vector<int32_t> tokens;
  std::vector<double> scores, prompt_scores;
  std::optional<FinishReason> finished;
  SequenceTimings timings;
};

inline std::vector<Collected> Collect(Generation& generation) {
  std::vector<Collected> all(generation.specs().size());
  while (!generation.finished()) {
    const auto event = generation.Next(std::chrono::milliseconds(0));
    if (!event) break;
    Collected& one = all[event->sequence];
    one.text += event->text;
    for (const GeneratedToken& token : event->tokens) {
      one.tokens.push_back(token.id);
      if (token.score) one.scores.push_back(token.score->chosen.log_probability);
    }
    for (const PositionScore& score : event->prompt_scores) {
      one.prompt_scores.push_back(score.chosen.log_probability);
    }
    if (event->finished) {
      one.finished = event->finished;
      one.timings = event->timings;
    }
  }
  return all;
}

}  // namespace winnow
