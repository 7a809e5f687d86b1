// plan.json: round trip, strictness, and survival of re-serialisation.
#include <gtest/gtest.h>

#include "base/error.h"
#include "plan/compression_plan.h"
#include "plan/loader_target.h"

namespace winnow {
namespace {

CompressionPlan Example() {
  CompressionPlan plan;
  plan.method = "naee";
  plan.search = "enumeration";
  plan.model_type = "mixtral";
  plan.model_fingerprint = "ab";
  plan.sources = {"prose"};
  plan.layers = {{0, 4, {0, 2}, {1, 3}, 1.25, 0.5}, {1, 4, {1, 3}, {0, 2}, 2.5, std::nullopt}};
  return plan;
}

TEST(Plan, RoundTripsThroughJson) {
  const CompressionPlan plan = Example();
  const std::string text = PlanToJson(plan).dump();
  const CompressionPlan again = PlanFromJson(ParseJson(text, "p"), "p");
  EXPECT_EQ(PlanToJson(again).dump(), text);
  EXPECT_EQ(again.layers[1].kept, (std::vector<int32_t>{1, 3}));
  EXPECT_FALSE(again.layers[1].margin.has_value());
}

TEST(Plan, AcceptsIntegersSpelledAsFloats) {
  Json json = ParseJson(PlanToJson(Example()).dump(), "p");
  json["layers"][0]["layer"] = 0.0;
  json["layers"][0]["kept"] = {0.0, 2.0};
  EXPECT_EQ(PlanFromJson(json, "p").layers[0].kept, (std::vector<int32_t>{0, 2}));
}

TEST(Plan, RefusesUnknownKeysAndBadTypes) {
  const Json good = ParseJson(PlanToJson(Example()).dump(), "p");
  Json bad = good;
  bad["layers"][0]["keep"] = {1};
  EXPECT_THROW(PlanFromJson(bad, "p"), ModelError);
  bad = good;
  bad["schema"] = "winnow.plan/99";
  EXPECT_THROW(PlanFromJson(bad, "p"), ModelError);
  bad = good;
  bad["layers"][0]["kept"] = {-1};
  EXPECT_THROW(PlanFromJson(bad, "p"), ModelError);
  bad = good;
  bad["layers"][0]["kept"] = {1e300};
  EXPECT_THROW(PlanFromJson(bad, "p"), ModelError);
  bad = good;
  bad["layers"] = 3;
  EXPECT_THROW(PlanFromJson(bad, "p"), ModelError);
  EXPECT_THROW(PlanFromJson(Json::array(), "p"), ModelError);
}

TEST(Plan, TargetsRefuseUnevenLayers) {
  CompressionPlan plan = Example();
  EXPECT_NO_THROW(CheckTarget(plan, "vllm"));
  plan.layers[1].kept = {0, 1, 3};
  EXPECT_THROW(CheckTarget(plan, "transformers"), UsageError);
  EXPECT_THROW(CheckTarget(plan, "torch"), UsageError);
}

}  // namespace
}  // namespace winnow
