// The scheduler with a model made of arithmetic: answers that depend on nothing but the request,
// the queue's bound, deadlines, clients that go away, prefixes that are reused.
#include "serve/scheduler.h"

#include <gtest/gtest.h>

#include <thread>

#include "serve/test_support.h"

namespace winnow {
namespace {

SequenceSpec Spec(std::vector<int32_t> prompt, int64_t max_tokens = 6, uint64_t seed = 1) {
  SequenceSpec spec;
  spec.prompt = std::move(prompt);
  spec.max_tokens = max_tokens;
  spec.sampling = {.temperature = 1.0f, .seed = seed};
  spec.top_logprobs = 2;
  return spec;
}

std::vector<int32_t> Ramp(int32_t first, int64_t count) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) ids.push_back(first + static_cast<int32_t>(i) * 3 % 50);
  return ids;
}

Collected Alone(const SequenceSpec& spec) {
  Bench bench;
  const auto generation = bench.scheduler.Submit({spec}, {});
  bench.RunAll();
  return Collect(*generation)[0];
}

void ExpectSame(const Collected& a, const Collected& b) {
  EXPECT_EQ(a.text, b.text);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.scores, b.scores);  // bitwise
  EXPECT_EQ(a.prompt_scores, b.prompt_scores);
  EXPECT_EQ(a.finished, b.finished);
}

TEST(Scheduler, AnswersDoNotDependOnOtherRequests) {
  std::vector<SequenceSpec> specs;
  for (int i = 0; i < 7; ++i) specs.push_back(Spec(Ramp(5 + i, 1 + 3 * i), 2 + i, 100 + i));
  specs[3].score_prompt = specs[5].score_prompt = true;
  Bench bench(SampleRunner(3));
  std::vector<std::shared_ptr<Generation>> generations;
  for (const SequenceSpec& spec : specs) generations.push_back(bench.scheduler.Submit({spec}, {}));
  bench.RunAll();
  for (size_t i = 0; i < specs.size(); ++i) {
    ASSERT_TRUE(generations[i]->failed() == false);
    const Collected together = Collect(*generations[i])[0];
    ExpectSame(together, Alone(specs[i]));
    EXPECT_EQ(together.tokens.size(), 2 + i);
    EXPECT_EQ(together.finished, FinishReason::kLength);
  }
}

TEST(Scheduler, ChoicesOfOneRequestAreThoseOfSeparateSeeds) {
  Bench bench;
  const auto generation = bench.scheduler.Submit(
      {Spec(Ramp(5, 9), 5, 7), Spec(Ramp(5, 9), 5, 8), Spec(Ramp(5, 9), 5, 9)}, {});
  bench.RunAll();
  const std::vector<Collected> choices = Collect(*generation);
  for (int i = 0; i < 3; ++i) ExpectSame(choices[i], Alone(Spec(Ramp(5, 9), 5, 7 + i)));
  EXPECT_NE(choices[0].tokens, choices[1].tokens);
  // The second and third took the prompt over, all but its last token.
  EXPECT_EQ(choices[1].timings.cached_tokens, 8);
  EXPECT_EQ(bench.runner.prefilled_tokens(), 9 + 1 + 1);
}

// Prompts that share beginnings of all kinds, also with what was generated before.
TEST(Scheduler, AnswersWithAndWithoutPrefixCacheAreTheSame) {
  std::vector<SequenceSpec> specs;
  for (const int64_t shared : {0, 1, 3, 4, 5, 8, 11, 11}) {
    std::vector<int32_t> prompt = Ramp(5, shared);
    for (const int32_t id : Ramp(60 + static_cast<int32_t>(shared), 4)) prompt.push_back(id);
    specs.push_back(Spec(prompt, 4, 3));
    specs.back().score_prompt = shared % 2 == 1;
  }
  // A continuation of the first answer, as the next turn of a conversation sends it.
  const Collected first = Alone(specs[0]);
  std::vector<int32_t> turn = specs[0].prompt;
  turn.insert(turn.end(), first.tokens.begin(), first.tokens.end());
  turn.push_back(70);
  specs.push_back(Spec(turn));
  specs.push_back(specs[0]);
  specs.push_back(specs[7]);
  for (const int64_t slots : {1, 2, 3}) {
    Bench bench(SampleRunner(slots));
    int64_t reused = 0;
    for (size_t i = 0; i < specs.size(); ++i) {
      const auto generation = bench.scheduler.Submit({specs[i]}, {});
      if (i % 3 == 1) bench.scheduler.Step();  // some of them together
      if (i % 3 == 2) bench.RunAll();
      if (i % 3 == 2 || i + 1 == specs.size()) {
        bench.RunAll();
        const Collected got = Collect(*generation)[0];
        ExpectSame(got, Alone(specs[i]));
        reused += got.timings.cached_tokens;
      }
    }
    EXPECT_GT(reused, 0);
    EXPECT_GT(bench.metrics.counts().prefix_hits, 0u);
    SchedulerOptions without = SampleScheduling();
    without.reuse_prefixes = false;
    Bench plain(SampleRunner(slots), without);
    for (const SequenceSpec& spec : specs) {
      const auto generation = plain.scheduler.Submit({spec}, {});
      plain.RunAll();
      const Collected got = Collect(*generation)[0];
      EXPECT_EQ(got.timings.cached_tokens, 0);
      ExpectSame(got, Alone(spec));
    }
    EXPECT_EQ(plain.metrics.counts().prefix_hits, 0u);
  }
}

// Choices of a multiple-choice question share the question: it is computed once, scores included.
TEST(Scheduler, ScoredPromptsShareTheirBeginning) {
  Bench bench(SampleRunner(2));
  std::vector<SequenceSpec> specs;
  for (int32_t answer = 0; answer < 4; ++answer) {
    std::vector<int32_t> prompt = Ramp(5, 20);
    prompt.push_back(80 + answer);
    prompt.push_back(90);
    specs.push_back(Spec(prompt, 1));
    specs.back().score_prompt = true;
  }
  const auto generation = bench.scheduler.Submit(specs, {});
  bench.RunAll();
  const std::vector<Collected> got = Collect(*generation);
  for (size_t i = 0; i < specs.size(); ++i) {
    ASSERT_EQ(got[i].prompt_scores.size(), 21u);
    ExpectSame(got[i], Alone(specs[i]));
    // The question's last token is computed again: it predicts another answer.
    EXPECT_EQ(got[i].timings.cached_tokens, i == 0 ? 0 : 19);
  }
}

TEST(Scheduler, AFullQueueRefuses) {
  SchedulerOptions options = SampleScheduling();
  options.max_queued_requests = 2;
  Bench bench(SampleRunner(1), options);
  const auto running = bench.scheduler.Submit({Spec(Ramp(5, 3))}, {});
  bench.scheduler.Step();
  const auto second = bench.scheduler.Submit({Spec(Ramp(6, 3))}, {});
  const auto third = bench.scheduler.Submit({Spec(Ramp(7, 3))}, {});
  try {
    bench.scheduler.Submit({Spec(Ramp(8, 3))}, {});
    ADD_FAILURE();
  } catch (const ApiError& error) {
    EXPECT_EQ(error.status(), 429);
    EXPECT_GT(error.retry_after_seconds(), 0);
  }
  bench.RunAll();
  bench.scheduler.Step();
  for (const auto& generation : {running, second, third}) {
    EXPECT_EQ(Collect(*generation)[0].tokens.size(), 6u);
  }
  EXPECT_EQ(bench.metrics.counts().refused_requests, 1u);
  EXPECT_EQ(bench.metrics.counts().queued_requests, 0);
}

TEST(Scheduler, LongPromptsTogetherAreRefused) {
  SchedulerOptions options = SampleScheduling();
  options.max_prompt_tokens = 20;
  Bench bench(SampleRunner(1), options);
  // One that is longer than all may be is taken if it is alone.
  auto first = bench.scheduler.Submit({Spec(Ramp(5, 15)), Spec(Ramp(5, 15))}, {});
  EXPECT_THROW(bench.scheduler.Submit({Spec(Ramp(6, 3))}, {}), ApiError);
  bench.RunAll();
  EXPECT_EQ(Collect(*first)[1].tokens.size(), 6u);
  EXPECT_THROW(bench.scheduler.Submit({Spec(Ramp(6, 3))}, {}), ApiError);
  first.reset();  // its client has its answer
  const auto second = bench.scheduler.Submit({Spec(Ramp(6, 10))}, {});
  const auto third = bench.scheduler.Submit({Spec(Ramp(7, 10))}, {});
  EXPECT_THROW(bench.scheduler.Submit({Spec(Ramp(8, 1))}, {}), ApiError);
  bench.RunAll();
  bench.scheduler.Step();
  EXPECT_EQ(Collect(*third)[0].tokens.size(), 6u);
  EXPECT_EQ(bench.metrics.counts().refused_requests, 3u);
}

TEST(Scheduler, PromptsMustFitTheContext) {
  Bench bench(SampleRunner(1, 16));
  EXPECT_THROW(bench.scheduler.Submit({Spec({})}, {}), ApiError);
  EXPECT_THROW(bench.scheduler.Submit({Spec(Ramp(1, 17))}, {}), ApiError);
  // A prompt that fills the context still yields one token; a shorter one what there is room for.
  const auto full = bench.scheduler.Submit({Spec(Ramp(1, 16), 99)}, {});
  const auto most = bench.scheduler.Submit({Spec(Ramp(1, 10), INT64_MAX)}, {});
  bench.RunAll();
  EXPECT_EQ(Collect(*full)[0].tokens.size(), 1u);
  const Collected got = Collect(*most)[0];
  EXPECT_EQ(got.tokens.size(), 7u);
  EXPECT_EQ(got.finished, FinishReason::kLength);
}

TEST(Scheduler, NoTokensAreDrawnWhereNoneAreWanted) {
  Bench bench;
  SequenceSpec spec = Spec(Ramp(5, 9), 0);
  spec.score_prompt = true;
  const auto generation = bench.scheduler.Submit({spec}, {});
  bench.RunAll();
  const Collected got = Collect(*generation)[0];
  EXPECT_TRUE(got.tokens.empty());
  EXPECT_EQ(got.prompt_scores.size(), 8u);
  EXPECT_EQ(got.finished, FinishReason::kLength);
  EXPECT_EQ(bench.runner.decode_calls(), 0);
}

int32_t IdOf(const std::string& text) {
  const auto ids = SampleTokenizer().Encode(text, false);
  return ids.back();
}

TEST(Scheduler, EndsAtEosUnlessToldNotTo) {
  const int32_t letter = IdOf("a"), eos = 2;
  FakeRunner::Options runner = SampleRunner();
  runner.favourite = [=](int32_t last) { return last == letter ? eos : letter; };
  SchedulerOptions options = SampleScheduling();
  options.vocabulary.eos_token_ids = {eos};
  Bench bench(runner, options);
  SequenceSpec spec = Spec({5}, 8);
  spec.sampling.temperature = 0;
  SequenceSpec on = spec;
  on.stop_at_eos = false;
  const auto generation = bench.scheduler.Submit({spec, on}, {});
  bench.RunAll();
  const std::vector<Collected> got = Collect(*generation);
  // The token that ended it is listed (with its score), but is no text.
  EXPECT_EQ(got[0].tokens, (std::vector<int32_t>{letter, eos}));
  EXPECT_EQ(got[0].text, SampleTokenizer().Decode(std::vector<int32_t>{letter}, true));
  EXPECT_EQ(got[0].finished, FinishReason::kStop);
  EXPECT_EQ(got[1].tokens.size(), 8u);
  EXPECT_EQ(got[1].finished, FinishReason::kLength);
}

TEST(Scheduler, EndsAtAStopStringAcrossTokens) {
  const std::vector<int32_t> cycle = SampleTokenizer().Encode("one two three one two three", false);
  FakeRunner::Options runner = SampleRunner();
  // The text again and again; each token is followed by the one that follows its first place.
  runner.favourite = [=](int32_t last) -> std::optional<int32_t> {
    for (size_t i = 0; i + 1 < cycle.size(); ++i) {
      if (cycle[i] == last) return cycle[i + 1];
    }
    return cycle[0];
  };
  SequenceSpec spec = Spec({5}, 40);
  spec.sampling.temperature = 0;
  Bench plain(runner);
  const auto whole = plain.scheduler.Submit({spec}, {});
  plain.RunAll();
  const Collected all = Collect(*whole)[0];
  ASSERT_GT(all.text.size(), 12u);
  const std::string stop = all.text.substr(7, 4);
  spec.stop = {"never", stop};
  Bench bench(runner);
  const auto stopped = bench.scheduler.Submit({spec}, {});
  bench.RunAll();
  const Collected got = Collect(*stopped)[0];
  EXPECT_EQ(got.text, all.text.substr(0, all.text.find(stop)));
  EXPECT_EQ(got.finished, FinishReason::kStop);
  EXPECT_LT(got.tokens.size(), all.tokens.size());
}

TEST(Scheduler, DeadlinesEndWaitingAndRunningRequests) {
  Generation::Clock::time_point now{};
  SchedulerOptions options = SampleScheduling();
  options.now = [&] { return now; };
  Bench bench(SampleRunner(1), options);
  const auto soon = now + std::chrono::seconds(1);
  const auto running = bench.scheduler.Submit({Spec(Ramp(5, 3), 50)}, soon);
  const auto waiting = bench.scheduler.Submit({Spec(Ramp(6, 3), 50)}, soon);
  const auto later = bench.scheduler.Submit({Spec(Ramp(7, 3))}, now + std::chrono::seconds(9));
  for (int i = 0; i < 3; ++i) bench.scheduler.Step();
  now += std::chrono::seconds(1);
  bench.RunAll();
  for (const auto& generation : {running, waiting}) {
    try {
      Collect(*generation);
      ADD_FAILURE();
    } catch (const ApiError& error) {
      EXPECT_EQ(error.status(), 503);
      EXPECT_EQ(error.code(), "timeout");
    }
  }
  EXPECT_EQ(Collect(*later)[0].tokens.size(), 6u);
  EXPECT_EQ(bench.metrics.counts().expired_requests, 2u);
}

TEST(Scheduler, AClientThatGoesAwayFreesItsSlot) {
  Bench bench(SampleRunner(1));
  const auto gone = bench.scheduler.Submit({Spec(Ramp(5, 3), 50)}, {});
  const auto also_gone = bench.scheduler.Submit({Spec(Ramp(5, 3), 50)}, {});
  const auto next = bench.scheduler.Submit({Spec(Ramp(6, 9))}, {});
  bench.scheduler.Step();
  gone->Cancel();
  also_gone->Cancel();
  bench.RunAll();
  EXPECT_TRUE(gone->failed());
  ExpectSame(Collect(*next)[0], Alone(Spec(Ramp(6, 9))));
  EXPECT_LT(bench.runner.decode_calls(), 10);
  EXPECT_EQ(bench.metrics.counts().cancelled_requests, 2u);
}

TEST(Scheduler, AFaultEndsItsRequestAndNothingElse) {
  int calls = 0;
  FakeRunner::Options runner = SampleRunner(2);
  runner.before_call = [&] {
    if (++calls == 1) throw std::runtime_error("fault in a prompt");
    if (calls == 6) throw RuntimeError("fault in a step");
  };
  std::vector<std::string> faults;
  SchedulerOptions options = SampleScheduling();
  options.on_fault = [&](const std::string& what) { faults.push_back(what); };
  Bench bench(runner, options);
  const auto first = bench.scheduler.Submit({Spec(Ramp(5, 3))}, {});
  const auto second = bench.scheduler.Submit({Spec(Ramp(5, 3))}, {});
  bench.RunAll();
  const auto third = bench.scheduler.Submit({Spec(Ramp(5, 3))}, {});
  bench.RunAll();
  EXPECT_THROW(Collect(*first), ApiError);
  EXPECT_THROW(Collect(*second), ApiError);
  ExpectSame(Collect(*third)[0], Alone(Spec(Ramp(5, 3))));
  EXPECT_EQ(faults.size(), 2u);
}

TEST(Scheduler, StopsAfterWhatRuns) {
  Bench bench(SampleRunner(1));
  const auto running = bench.scheduler.Submit({Spec(Ramp(5, 3))}, {});
  const auto waiting = bench.scheduler.Submit({Spec(Ramp(6, 3))}, {});
  bench.scheduler.Step();
  bench.scheduler.BeginStop();
  EXPECT_THROW(bench.scheduler.Submit({Spec(Ramp(7, 3))}, {}), ApiError);
  bench.scheduler.Run();  // comes back
  ExpectSame(Collect(*running)[0], Alone(Spec(Ramp(5, 3))));
  EXPECT_THROW(Collect(*waiting), ApiError);
}

TEST(Scheduler, AbandonsWhatRunsIfItMust) {
  std::atomic<bool> abandoned{false};
  SchedulerOptions options = SampleScheduling();
  options.abandoned = &abandoned;
  Bench bench(SampleRunner(1), options);
  const auto running = bench.scheduler.Submit({Spec(Ramp(5, 3), 50)}, {});
  bench.scheduler.Step();
  bench.scheduler.BeginStop();
  abandoned = true;
  bench.scheduler.Run();
  EXPECT_THROW(Collect(*running), ApiError);
}

TEST(Scheduler, RunsInAThreadOfItsOwn) {
  Bench bench(SampleRunner(2));
  std::thread worker([&] { bench.scheduler.Run(); });
  std::vector<std::thread> clients;
  std::vector<Collected> got(8);
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([&, i] {
      const auto generation = bench.scheduler.Submit({Spec(Ramp(5 + i, 5))}, {});
      while (!generation->finished()) {
        const auto event = generation->Next(std::chrono::milliseconds(50));
        if (!event) continue;
        for (const GeneratedToken& token : event->tokens) got[i].tokens.push_back(token.id);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  bench.scheduler.BeginStop();
  worker.join();
  for (int i = 0; i < 8; ++i) EXPECT_EQ(got[i].tokens, Alone(Spec(Ramp(5 + i, 5))).tokens);
}

TEST(Metrics, TextIsPrometheus) {
  Bench bench;
  bench.scheduler.Submit({Spec(Ramp(5, 9))}, {});
  bench.RunAll();
  bench.metrics.CountRequest("/v1/completions", 200);
  bench.metrics.CountRequest("/v1/completions", 200);
  bench.metrics.CountRequest("other", 404);
  const std::string text = bench.metrics.Text();
  const auto has = [&](const std::string& line) {
    EXPECT_NE(text.find("\n" + line + "\n"), std::string::npos) << line << "\n" << text;
  };
  has("winnow_http_requests_total{endpoint=\"/v1/completions\",status=\"200\"} 2");
  has("winnow_http_requests_total{endpoint=\"other\",status=\"404\"} 1");
  has("winnow_prompt_tokens_total 9");
  has("winnow_generated_tokens_total 6");
  has("winnow_decode_steps_total 5");
  has("winnow_running_sequences 0");
  const SchedulerCounts counts = bench.metrics.counts();
  EXPECT_EQ(counts.experts_used + counts.experts_skipped, (9u + 5u) * 2 * 2);
  EXPECT_GT(counts.experts_skipped, 0u);
  // Every sample follows its own HELP and TYPE.
  size_t samples = 0;
  std::string described;
  for (size_t at = 0, end; at < text.size(); at = end + 1) {
    end = text.find('\n', at);
    ASSERT_NE(end, std::string::npos);  // the last line ends too
    const std::string line = text.substr(at, end - at);
    if (line.starts_with("# TYPE ")) described = line.substr(7, line.find(' ', 7) - 7);
    if (line.starts_with("#")) continue;
    EXPECT_EQ(line.substr(0, line.find_first_of("{ ")), described);
    ++samples;
  }
  EXPECT_GT(samples, 20u);
}

}  // namespace
}  // namespace winnow
