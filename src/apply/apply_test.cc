// Rewritten checkpoints: every tensor byte for byte, what else is in the folder, resuming, and that
// the result computes what the plan promised.
#include <gtest/gtest.h>

#include <set>

#include "apply/checkpoint_rewriter.h"
#include "apply/model_card.h"
#include "base/error.h"
#include "checkpoint/safetensors_writer.h"
#include "forward/test_support.h"

namespace winnow {
namespace {

// Keeps `keep` experts of every layer, another choice in each.
CompressionPlan MakePlan(const Model& model, int64_t keep) {
  CompressionPlan plan;
  plan.method = "test";
  plan.model_type = std::string(model.config().family->model_type);
  plan.model_fingerprint = model.checkpoint().FingerprintHex();
  for (const int32_t index : model.config().MoeLayers()) {
    LayerPlan layer;
    layer.layer = index;
    layer.num_experts = model.config().layers[static_cast<size_t>(index)].num_experts;
    for (int32_t i = 0; i < keep; ++i) {
      layer.kept.push_back(
          static_cast<int32_t>((2 * i + index + (2 * i >= layer.num_experts)) % layer.num_experts));
    }
    std::sort(layer.kept.begin(), layer.kept.end());
    for (int32_t e = 0; e < layer.num_experts; ++e) {
      if (!std::binary_search(layer.kept.begin(), layer.kept.end(), e)) layer.dropped.push_back(e);
    }
    plan.layers.push_back(std::move(layer));
  }
  return plan;
}

void Apply(const Model& model, const CompressionPlan& plan, const ApplyOptions& options,
           const fs::path& output, const JobControl& control = {}) {
  ApplyPlan(model, plan, PlanRewrite(model, plan, options), options, output, control);
}

std::string Bytes(const Checkpoint& checkpoint, const std::string& name) {
  const TensorInfo* tensor = checkpoint.Find(name);
  if (tensor == nullptr) throw RuntimeError("no tensor " + name);
  std::string bytes(static_cast<size_t>(tensor->bytes), '\0');
  checkpoint.Read(*tensor, std::as_writable_bytes(std::span(bytes)));
  return bytes;
}

// Rows `kept` of the first axis.
std::string Gathered(const std::string& bytes, size_t rows, const std::vector<int32_t>& kept) {
  const size_t row = bytes.size() / rows;
  std::string gathered;
  for (const int32_t e : kept) gathered += bytes.substr(static_cast<size_t>(e) * row, row);
  return gathered;
}

// Name and bytes of every tensor the plan promises, worked out from the names alone.
std::map<std::string, std::string> ExpectedTensors(const Model& model,
                                                   const CompressionPlan& plan) {
  std::map<std::string, std::string> expected;
  for (const TensorInfo& tensor : model.checkpoint().tensors()) {
    std::string name = tensor.name;
    std::string bytes = Bytes(model.checkpoint(), name);
    bool dropped = false;
    for (const LayerPlan& layer : plan.layers) {
      if (name.rfind("model.layers." + std::to_string(layer.layer) + ".", 0) != 0) continue;
      const size_t experts = name.find(".experts.");
      if (name.ends_with(".gate.weight") || name.ends_with("experts.gate_up_proj") ||
          name.ends_with("experts.down_proj")) {
        bytes = Gathered(bytes, tensor.shape[0], layer.kept);
      } else if (experts != std::string::npos) {
        const size_t number = experts + std::string(".experts.").size();
        const size_t end = name.find('.', number);
        const auto at = std::find(layer.kept.begin(), layer.kept.end(),
                                  std::stoi(name.substr(number, end - number)));
        dropped = at == layer.kept.end();
        name.replace(number, end - number, std::to_string(at - layer.kept.begin()));
      }
    }
    if (!dropped) expected[name] = std::move(bytes);
  }
  return expected;
}

class ApplyTest : public testing::Test {
 protected:
  fs::path Path(const std::string& name) const { return folder_.path() / name; }
  const TestFolder folder_;
};

class ApplyLayouts : public ApplyTest, public testing::WithParamInterface<const char*> {};

TEST_P(ApplyLayouts, EveryTensorIsAsPlanned) {
  const fs::path source = CopyFolder(GoldenFolder(GetParam()), Path("source"));
  WriteFileAtomically(source / "tokenizer.json", "{\"any\": \"bytes\"}");
  WriteFileAtomically(source / "pytorch_model.bin", "weights that no longer fit");
  const Model model = Model::Open(source);
  const CompressionPlan plan = MakePlan(model, 4);
  const RewritePlan rewrite = PlanRewrite(model, plan, {});
  const ApplyResult result = ApplyPlan(model, plan, rewrite, {}, Path("out"), {});
  const Checkpoint written = Checkpoint::Open(Path("out"));
  EXPECT_EQ(written.findings(), std::vector<std::string>{});
  const std::map<std::string, std::string> expected = ExpectedTensors(model, plan);
  EXPECT_EQ(written.tensors().size(), expected.size());
  EXPECT_EQ(result.audited_tensors, static_cast<int64_t>(expected.size()));
  uint64_t bytes = 0;
  for (const auto& [name, content] : expected) {
    ASSERT_NE(written.Find(name), nullptr) << name;
    EXPECT_TRUE(Bytes(written, name) == content) << name;
    bytes += content.size();
  }
  EXPECT_EQ(result.bytes_written, bytes);
  // Layout, order and files are the source's.
  EXPECT_EQ(written.has_index(), model.checkpoint().has_index());
  ASSERT_EQ(written.shards().size(), model.checkpoint().shards().size());
  uint64_t files = 0;
  for (size_t i = 0; i < written.shards().size(); ++i) {
    const SafetensorsFile& shard = written.shards()[i];
    EXPECT_EQ(shard.path().filename(), model.checkpoint().shards()[i].path().filename());
    EXPECT_EQ(shard.metadata().at("format"), "pt");
    files += shard.file().size();
  }
  EXPECT_EQ(files, rewrite.bytes_after);
  EXPECT_EQ(ReadTextFile(Path("out") / "tokenizer.json"), "{\"any\": \"bytes\"}");
  EXPECT_FALSE(fs::exists(Path("out") / "pytorch_model.bin"));
  EXPECT_FALSE(fs::exists(Path("out") / "apply.journal"));
  EXPECT_FALSE(fs::exists(Path("out.partial")));
  // config.json: the same keys in the same order, other counts of experts.
  OrderedJson config = ReadConfig(source);
  for (const char* key : {"num_local_experts", "num_experts", "n_routed_experts"}) {
    if (config.contains(key)) config[key] = 4;
  }
  EXPECT_EQ(ReadConfig(Path("out")).dump(), config.dump());
  EXPECT_EQ(PlanToJson(ReadPlan(Path("out") / "winnow-plan.json")).dump(), PlanToJson(plan).dump());
}

// The pruned checkpoint computes, bit for bit, what the original does with the same experts.
TEST_P(ApplyLayouts, ComputesWhatThePlanPromised) {
  const Model model = Model::Open(GoldenFolder(GetParam()));
  const TokenSet tokens = GoldenTokens(GetParam());
  const std::vector<float> intact = RunForward(model, tokens).logits;
  for (const int64_t keep : {3, 5}) {
    const CompressionPlan plan = MakePlan(model, keep);
    Apply(model, plan, {}, Path("out"));
    const ForwardTrace what_if =
        RunForward(model, tokens, {.kept_experts = KeptExperts(plan, model.config().num_layers())});
    const ForwardTrace pruned = RunForward(Model::Open(Path("out")), tokens);
    EXPECT_EQ(pruned.logits, what_if.logits);
    for (const auto& [index, layer] : pruned.layers) {
      EXPECT_EQ(layer.router_logits, what_if.layers.at(index).router_logits);
      EXPECT_EQ(layer.topk_weights, what_if.layers.at(index).topk_weights);
    }
    EXPECT_GT(MaxDifference(pruned.logits, intact), 1e-2);
  }
}

INSTANTIATE_TEST_SUITE_P(, ApplyLayouts,
                         testing::Values("mixtral", "mixtral-bf16-sharded", "mixtral-bf16-fused",
                                         "qwen2_moe", "qwen3_moe-bf16", "qwen3_moe-dense-layer",
                                         "olmoe", "deepseek-bf16"),
                         TestName);

TEST_F(ApplyTest, LayoutsOfTheSameWeightsPruneToTheSameModel) {
  const TokenSet tokens = GoldenTokens("mixtral-bf16-fused");
  std::vector<std::vector<float>> logits;
  for (const char* name : {"mixtral-bf16-fused", "mixtral-bf16-sharded"}) {
    const Model model = Model::Open(GoldenFolder(name));
    Apply(model, MakePlan(model, 3), {}, Path(name));
    logits.push_back(RunForward(Model::Open(Path(name)), tokens).logits);
  }
  EXPECT_EQ(logits[0], logits[1]);
}

// Shards that hold nothing but dropped experts vanish and the others are numbered anew.
TEST_F(ApplyTest, EmptiedShardsVanish) {
  const Model golden = Model::Open(GoldenFolder("mixtral"));
  CompressionPlan plan = MakePlan(golden, 5);
  for (LayerPlan& layer : plan.layers) {
    layer.kept = {0, 1, 2, 3, 5};
    layer.dropped = {4};
  }
  const fs::path source = Path("source");
  fs::create_directories(source);
  std::map<std::string, std::string> content;
  std::vector<TensorData> shards[3];
  OrderedJson weight_map;
  for (const TensorInfo& tensor : golden.checkpoint().tensors()) {
    content[tensor.name] = Bytes(golden.checkpoint(), tensor.name);
    const size_t shard = tensor.name.find(".experts.4.") != std::string::npos  ? 1
                         : tensor.name.find(".layers.2.") != std::string::npos ? 2
                                                                               : 0;
    shards[shard].push_back(
        {tensor.name, tensor.dtype, tensor.shape, std::as_bytes(std::span(content[tensor.name]))});
    weight_map[tensor.name] = "model-0000" + std::to_string(shard + 1) + "-of-00003.safetensors";
  }
  for (size_t i = 0; i < 3; ++i) {
    WriteSafetensors(source / ("model-0000" + std::to_string(i + 1) + "-of-00003.safetensors"),
                     shards[i], {{"format", "pt"}, {"note", "kept"}});
  }
  const OrderedJson index = {{"metadata", OrderedJson::object()}, {"weight_map", weight_map}};
  WriteFileAtomically(source / "model.safetensors.index.json", index.dump());
  fs::copy_file(GoldenFolder("mixtral") / "config.json", source / "config.json");
  const Model model = Model::Open(source);
  plan.model_fingerprint = model.checkpoint().FingerprintHex();
  Apply(model, plan, {}, Path("out"));
  const Checkpoint written = Checkpoint::Open(Path("out"));
  EXPECT_EQ(written.findings(), std::vector<std::string>{});
  ASSERT_EQ(written.shards().size(), 2u);
  EXPECT_EQ(written.shards()[1].path().filename(), "model-00002-of-00002.safetensors");
  EXPECT_EQ(written.shards()[1].metadata().at("note"), "kept");
  for (const auto& [name, bytes] : ExpectedTensors(model, plan)) {
    EXPECT_TRUE(Bytes(written, name) == bytes) << name;
  }
}

TEST_F(ApplyTest, ConvertsDtypes) {
  struct Case {
    const char* model;
    Dtype dtype;
    const char* name;
  };
  for (const Case& c :
       {Case{"mixtral", Dtype::kBF16, "bfloat16"}, Case{"mixtral", Dtype::kF16, "float16"},
        Case{"mixtral-bf16-fused", Dtype::kF32, "float32"},
        Case{"mixtral-bf16-fused", Dtype::kBF16, "bfloat16"},
        Case{"deepseek-bf16", Dtype::kF16, "float16"}}) {
    SCOPED_TRACE(testing::Message() << c.model << " to " << c.name);
    const Model model = Model::Open(GoldenFolder(c.model));
    const CompressionPlan plan = MakePlan(model, 4);
    Apply(model, plan, {.dtype = c.dtype}, Path("out"));
    const Checkpoint written = Checkpoint::Open(Path("out"));
    const std::map<std::string, std::string> expected = ExpectedTensors(model, plan);
    const Dtype from = model.checkpoint().tensors().front().dtype;
    for (const auto& [name, bytes] : expected) {
      const std::string got = Bytes(written, name);
      EXPECT_EQ(written.Find(name)->dtype, c.dtype);
      const size_t count = bytes.size() * 8 / DtypeBits(from);
      ASSERT_EQ(got.size() * 8 / DtypeBits(c.dtype), count) << name;
      size_t wrong = 0;
      for (size_t i = 0; i < count; ++i) {
        float value = LoadAsFloat(from, std::as_bytes(std::span(bytes)).data(), i);
        if (c.dtype == Dtype::kBF16) value = FloatFromBf16(Bf16FromFloat(value));
        if (c.dtype == Dtype::kF16) value = FloatFromF16(F16FromFloat(value));
        wrong += LoadAsFloat(c.dtype, std::as_bytes(std::span(got)).data(), i) != value;
      }
      EXPECT_EQ(wrong, 0u) << name;
    }
    const OrderedJson config = ReadConfig(Path("out"));
    const bool new_dialect = ReadConfig(GoldenFolder(c.model)).contains("dtype");
    EXPECT_EQ(config.at(new_dialect ? "dtype" : "torch_dtype"), c.name);
    EXPECT_FALSE(config.contains(new_dialect ? "torch_dtype" : "dtype"));
    EXPECT_NO_THROW(Model::Open(Path("out")));
  }
}

TEST_F(ApplyTest, ResumedRunsWriteTheSameBytes) {
  const Model model = Model::Open(GoldenFolder("mixtral-bf16-sharded"));
  const CompressionPlan plan = MakePlan(model, 4);
  Apply(model, plan, {}, Path("whole"));
  int interruptions = 0;
  for (int event = 1;; ++event) {
    std::atomic<bool> interrupted = false;
    int seen = 0;
    JobControl control;
    control.interrupted = &interrupted;
    control.on_progress = [&](const ProgressEvent& progress) {
      EXPECT_TRUE(progress.bytes);
      EXPECT_LE(progress.work_done, progress.work_total);
      interrupted = ++seen >= event;
    };
    fs::remove_all(Path("out"));
    fs::remove_all(Path("out.partial"));
    try {
      Apply(model, plan, {}, Path("out"), control);
      EXPECT_LT(seen, event + 1);
      break;
    } catch (const InterruptedError&) {
      ++interruptions;
    }
    EXPECT_FALSE(fs::exists(Path("out")));
    ASSERT_TRUE(fs::exists(Path("out.partial")));
    // Another plan cannot go on with it once a shard is finished.
    if (fs::exists(Path("out.partial") / "apply.journal")) {
      EXPECT_THROW(Apply(model, MakePlan(model, 3), {.resume = true}, Path("out")), UsageError);
      EXPECT_THROW(Apply(model, plan, {.dtype = Dtype::kF32, .resume = true}, Path("out")),
                   UsageError);
    }
    Apply(model, plan, {.resume = true}, Path("out"));
    ExpectSameContent(Path("whole"), Path("out"));
  }
  EXPECT_GE(interruptions, 3);
}

// A complete shard is not written again when a run is resumed.
TEST_F(ApplyTest, ResumingSkipsFinishedShards) {
  const Model model = Model::Open(GoldenFolder("mixtral-bf16-sharded"));
  const CompressionPlan plan = MakePlan(model, 4);
  const RewritePlan rewrite = PlanRewrite(model, plan, {});
  const auto first_shard = static_cast<int64_t>(rewrite.shards[0].bytes);
  std::atomic<bool> interrupted = false;
  JobControl control;
  control.interrupted = &interrupted;
  control.on_progress = [&](const ProgressEvent& e) { interrupted = e.work_done > first_shard; };
  EXPECT_THROW(ApplyPlan(model, plan, rewrite, {}, Path("out"), control), InterruptedError);
  const ApplyResult result = ApplyPlan(model, plan, rewrite, {.resume = true}, Path("out"), {});
  uint64_t bytes = 0;
  for (size_t i = 1; i < rewrite.shards.size(); ++i) {
    bytes += rewrite.shards[i].bytes - rewrite.shards[i].header.size();
  }
  EXPECT_EQ(result.bytes_written, bytes);
}

TEST_F(ApplyTest, NothingIsPublishedWhenASourceCannotBeRead) {
  const fs::path source = CopyFolder(GoldenFolder("mixtral-bf16-sharded"), Path("source"));
  const Model model = Model::Open(source);
  const CompressionPlan plan = MakePlan(model, 4);
  const RewritePlan rewrite = PlanRewrite(model, plan, {});
  fs::resize_file(source / "model-00003-of-00003.safetensors", 20000);  // after it was opened
  EXPECT_THROW(ApplyPlan(model, plan, rewrite, {}, Path("out"), {}), Error);
  EXPECT_FALSE(fs::exists(Path("out")));
}

TEST_F(ApplyTest, AuditFindsWhatDiffers) {
  // An interrupted run is continued after someone changed a finished shard.
  const Model model = Model::Open(GoldenFolder("mixtral-bf16-sharded"));
  const CompressionPlan plan = MakePlan(model, 4);
  const RewritePlan rewrite = PlanRewrite(model, plan, {});
  const auto first_shard = static_cast<int64_t>(rewrite.shards[0].bytes);
  std::atomic<bool> interrupted = false;
  JobControl control;
  control.interrupted = &interrupted;
  control.on_progress = [&](const ProgressEvent& e) { interrupted = e.work_done > first_shard; };
  EXPECT_THROW(ApplyPlan(model, plan, rewrite, {}, Path("out"), control), InterruptedError);
  {
    const File shard = File::OpenWrite(Path("out.partial") / rewrite.shards[0].file_name);
    const std::byte wrong{0x55};
    shard.WriteAt(rewrite.shards[0].tensors[2].info.file_offset, std::span(&wrong, 1));
  }
  EXPECT_THROW(ApplyPlan(model, plan, rewrite, {.resume = true}, Path("out"), {}), ModelError);
  EXPECT_FALSE(fs::exists(Path("out")));
}

TEST_F(ApplyTest, CardTellsWhatWasDone) {
  const fs::path source = CopyFolder(GoldenFolder("mixtral"), Path("source"));
  const Model model = Model::Open(source);
  CompressionPlan plan = MakePlan(model, 4);
  plan.sources = {"prose", "code"};
  plan.calibration_tokens = 12345;
  plan.layers[0].loss = 1.5;
  Apply(model, plan, {}, Path("out"));
  const std::string card = ReadTextFile(Path("out") / "README.md");
  for (const char* part : {"mixtral", "| experts, all layers | 18 | 12 |", "12,345 tokens",
                           "prose, code", "| 0 | 0 1 2 4 | 1.5 |  |"}) {
    EXPECT_NE(card.find(part), std::string::npos) << part << "\n" << card;
  }
  // The source's own card is carried through, ours goes beside it.
  WriteFileAtomically(source / "README.md", "theirs");
  Apply(Model::Open(source), plan, {}, Path("out"));
  EXPECT_EQ(ReadTextFile(Path("out") / "README.md"), "theirs");
  EXPECT_EQ(ReadTextFile(Path("out") / "WINNOW.md"), card);
}

// Plans that do not fit the model.
TEST_F(ApplyTest, RefusesIllegalPlans) {
  const Model model = Model::Open(GoldenFolder("qwen3_moe-dense-layer"));  // layers 0, 2; k = 2
  const auto refused = [&](const std::function<void(CompressionPlan&)>& edit) {
    CompressionPlan plan = MakePlan(model, 3);
    edit(plan);
    try {
      PlanRewrite(model, plan, {});
    } catch (const UsageError&) {
      return true;
    }
    return false;
  };
  EXPECT_FALSE(refused([](CompressionPlan&) {}));
  EXPECT_FALSE(refused([](CompressionPlan& p) { p.model_fingerprint.clear(); }));
  EXPECT_FALSE(refused([](CompressionPlan& p) {  // as people write them
    p.model_type.clear();
    for (LayerPlan& layer : p.layers) {
      layer.dropped.clear();
      layer.num_experts = 0;
    }
  }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.model_type = "mixtral"; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.model_fingerprint[0] ^= 1; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers.pop_back(); }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers.clear(); }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[1] = p.layers[0]; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { std::swap(p.layers[0], p.layers[1]); }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[0].layer = 1; }));  // dense
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[1].layer = 3; }));  // beyond the last
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[1].layer = -1; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[0].num_experts = 8; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[0].dropped[0] = p.layers[0].kept[0]; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[0].dropped.pop_back(); }));
  const auto refused_kept = [&](std::vector<int32_t> kept) {
    return refused([&](CompressionPlan& p) {
      for (LayerPlan& layer : p.layers) {
        layer.kept = kept;
        layer.dropped.clear();
      }
    });
  };
  EXPECT_FALSE(refused_kept({1, 5}));
  EXPECT_FALSE(refused_kept({0, 1, 2, 3, 4, 5}));
  EXPECT_TRUE(refused_kept({}));
  EXPECT_TRUE(refused_kept({1}));  // each token uses two
  EXPECT_TRUE(refused_kept({1, 6}));
  EXPECT_TRUE(refused_kept({-1, 2}));
  EXPECT_TRUE(refused_kept({2, 1}));
  EXPECT_TRUE(refused_kept({2, 2}));
  EXPECT_TRUE(refused([](CompressionPlan& p) {  // config.json has one number for all layers
    p.layers[0].kept = {0, 1};
    p.layers[0].dropped.clear();
  }));
}

// Keeping all experts is a copy.
TEST_F(ApplyTest, KeepingEverythingCopies) {
  const Model model = Model::Open(GoldenFolder("olmoe"));
  Apply(model, MakePlan(model, 8), {}, Path("out"));
  const Checkpoint written = Checkpoint::Open(Path("out"));
  ASSERT_EQ(written.tensors().size(), model.checkpoint().tensors().size());
  for (size_t i = 0; i < written.tensors().size(); ++i) {
    const std::string& name = written.tensors()[i].name;
    EXPECT_EQ(name, model.checkpoint().tensors()[i].name);
    EXPECT_TRUE(Bytes(written, name) == Bytes(model.checkpoint(), name)) << name;
  }
}

}  // namespace
}  // namespace winnow
