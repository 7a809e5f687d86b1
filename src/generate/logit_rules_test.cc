// Penalties, biases and log-probabilities, against values worked out by hand.
#include "generate/logit_rules.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/error.h"
#include "generate/token_scores.h"

namespace winnow {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> Apply(const LogitRules& rules, const TokenHistory& history,
                         std::vector<float> logits, float temperature = 1) {
  ApplyLogitRules(rules, history, temperature, logits);
  return logits;
}

TEST(LogitRules, PenaltiesCountGeneratedTokensOnly) {
  TokenHistory history(std::vector<int32_t>{0});
  history.Add(1);
  history.Add(1);
  history.Add(2);
  EXPECT_EQ(Apply({.presence_penalty = 0.5f, .frequency_penalty = 0.25f}, history, {1, 1, 1, 1}),
            (std::vector<float>{1, 0, 0.25f, 1}));
}

TEST(LogitRules, RepetitionCountsThePromptTooAndOnce) {
  TokenHistory history(std::vector<int32_t>{0, 1});
  history.Add(1);
  history.Add(2);
  EXPECT_EQ(Apply({.repetition_penalty = 2}, history, {4, -1, 6, 8}),
            (std::vector<float>{2, -2, 3, 8}));
}

TEST(LogitRules, BiasIsAddedAndForeignIdsAreIgnored) {
  EXPECT_EQ(Apply({.logit_bias = {{1, -100}, {0, 2}, {7, 1}, {-1, 1}}},
                  TokenHistory(std::vector<int32_t>{9}), {0, 0}),
            (std::vector<float>{2, -100}));
}

TEST(LogitRules, MinPDropsBelowAShareOfTheLikeliest) {
  const TokenHistory none(std::vector<int32_t>{});
  // Probabilities relative to the first: 1, exp(-1) = 0.37, exp(-2) = 0.14.
  EXPECT_EQ(Apply({.min_p = 0.3f}, none, {2, 1, 0}), (std::vector<float>{2, 1, -kInfinity}));
  // At half the temperature 1, 0.14, 0.02.
  EXPECT_EQ(Apply({.min_p = 0.3f}, none, {2, 1, 0}, 0.5f),
            (std::vector<float>{2, -kInfinity, -kInfinity}));
  EXPECT_EQ(Apply({.min_p = 0.3f}, none, {2, 1, 0}, 0), (std::vector<float>{2, 1, 0}));
}

TEST(TokenScores, AreLogarithmsOfTheSoftmax) {
  const std::vector<float> logits = {std::log(1.0f), std::log(2.0f), std::log(5.0f)};
  const PositionScore score = ScorePosition(logits, 1, 2);
  EXPECT_NEAR(score.chosen.log_probability, std::log(0.25), 1e-6);  // f32 logits
  ASSERT_EQ(score.likeliest.size(), 2u);
  EXPECT_EQ(score.likeliest[0].token, 2);
  EXPECT_NEAR(score.likeliest[0].log_probability, std::log(0.625), 1e-6);
  EXPECT_EQ(score.likeliest[1].token, 1);
  EXPECT_EQ(score.likeliest[1].log_probability, score.chosen.log_probability);  // bitwise
}

TEST(TokenScores, EqualLogitsListTheLowerIdFirst) {
  const std::vector<float> logits = {1, 3, 3, 2, 3};
  const PositionScore score = ScorePosition(logits, 0, 3);
  std::vector<int32_t> ids;
  for (const TokenScore& one : score.likeliest) ids.push_back(one.token);
  EXPECT_EQ(ids, (std::vector<int32_t>{1, 2, 4}));
  EXPECT_EQ(ScorePosition(logits, 0, 9).likeliest.size(), 5u);
  EXPECT_TRUE(ScorePosition(logits, 0, 0).likeliest.empty());
}

TEST(TokenScores, RefuseWhatIsNotFiniteOrOutside) {
  EXPECT_THROW(ScorePosition(std::vector<float>{0, NAN}, 0, 1), ModelError);
  EXPECT_THROW(ScorePosition(std::vector<float>{0, kInfinity}, 0, 1), ModelError);
  EXPECT_THROW(ScorePosition(std::vector<float>{0, 1}, 2, 1), UsageError);
  EXPECT_THROW(ScorePosition(std::vector<float>{0, 1}, -1, 1), UsageError);
}

}  // namespace
}  // namespace winnow
