// Models over real folders: what each tensor is, and refusal of folders whose tensors do not fit
// their config.
#include "model/model.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "checkpoint/safetensors_writer.h"
#include "model/test_support.h"

namespace winnow {
namespace {

class ModelTest : public testing::Test {
 protected:
  fs::path Copy(const std::string& name) {
    fs::remove_all(folder_.path() / "model");
    return CopyFolder(GoldenFolder(name), folder_.path() / "model");
  }
  // The message of opening a copy whose config was edited.
  std::string Refusal(const std::string& name, const std::function<void(OrderedJson&)>& edit) {
    const fs::path copy = Copy(name);
    EditConfig(copy, edit);
    return ModelErrorOf([&] { Model::Open(copy); });
  }
  const TestFolder folder_;
};

// Rewrites a model.safetensors; `change` may alter or (returning false) drop a tensor.
struct StoredTensor {
  TensorInfo info;
  std::string data;
};
void RewriteTensors(const fs::path& folder, const std::function<bool(StoredTensor&)>& change,
                    std::vector<StoredTensor> more = {}) {
  const fs::path path = folder / "model.safetensors";
  std::vector<StoredTensor> stored;
  {
    const SafetensorsFile file = SafetensorsFile::Open(path);
    for (const TensorInfo& tensor : file.tensors()) {
      StoredTensor each{tensor, std::string(static_cast<size_t>(tensor.bytes), '\0')};
      file.Read(tensor, std::as_writable_bytes(std::span(each.data)));
      if (change(each)) stored.push_back(std::move(each));
    }
  }
  for (StoredTensor& each : more) stored.push_back(std::move(each));
  std::vector<TensorData> tensors;
  for (const StoredTensor& each : stored) {
    tensors.push_back(
        {each.info.name, each.info.dtype, each.info.shape, std::as_bytes(std::span(each.data))});
  }
  WriteSafetensors(path, tensors, {{"format", "pt"}});
}

StoredTensor Zeros(const std::string& name, Dtype dtype, std::vector<uint64_t> shape) {
  uint64_t bytes = DtypeBits(dtype) / 8;
  for (const uint64_t dim : shape) bytes *= dim;
  return {{.name = name, .dtype = dtype, .shape = std::move(shape)},
          std::string(static_cast<size_t>(bytes), '\0')};
}

bool KeepAll(StoredTensor&) {
  return true;
}

void ExpectHas(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

TEST_F(ModelTest, KnowsWhatEachTensorIs) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  const TensorRole expert = model.RoleOf("model.layers.1.block_sparse_moe.experts.4.w2.weight");
  EXPECT_EQ(expert.kind, TensorKind::kExpert);
  EXPECT_EQ(expert.layer, 1);
  EXPECT_EQ(expert.expert, 4);
  EXPECT_EQ(model.RoleOf("model.layers.2.block_sparse_moe.gate.weight").kind,
            TensorKind::kExpertAxis0);
  EXPECT_EQ(model.RoleOf("model.layers.2.self_attn.q_proj.weight").kind, TensorKind::kOther);
  EXPECT_EQ(model.RoleOf("lm_head.weight").kind, TensorKind::kOther);
  EXPECT_EQ(model.RoleOf("no such tensor").kind, TensorKind::kOther);
  EXPECT_EQ(model.RenameExpert("model.layers.1.block_sparse_moe.experts.4.w2.weight", 4, 11),
            "model.layers.1.block_sparse_moe.experts.11.w2.weight");
  const Model fused = Model::Open(GoldenFolder("mixtral-bf16-fused"));
  EXPECT_EQ(fused.RoleOf("model.layers.1.mlp.experts.gate_up_proj").kind, TensorKind::kExpertAxis0);
  EXPECT_EQ(fused.RoleOf("model.layers.1.mlp.experts.down_proj").layer, 1);
  const Model qwen2 = Model::Open(GoldenFolder("qwen2_moe"));
  EXPECT_EQ(qwen2.RoleOf("model.layers.0.mlp.shared_expert.down_proj.weight").kind,
            TensorKind::kOther);
  EXPECT_EQ(qwen2.RoleOf("model.layers.0.mlp.shared_expert_gate.weight").kind, TensorKind::kOther);
}

TEST_F(ModelTest, FusedAndPerExpertSlicesHoldTheSameBytes) {
  const Model fused = Model::Open(GoldenFolder("mixtral-bf16-fused"));
  const Model sharded = Model::Open(GoldenFolder("mixtral-bf16-sharded"));
  const auto bytes = [](const Model& model, const TensorSlice& slice) {
    std::string data(static_cast<size_t>(slice.bytes()), '\0');
    model.checkpoint().ReadPart(*slice.tensor, slice.offset_bytes,
                                std::as_writable_bytes(std::span(data)));
    return data;
  };
  for (size_t layer = 0; layer < 3; ++layer) {
    for (size_t e = 0; e < 6; ++e) {
      const FeedForwardSlices& a = fused.layers()[layer].experts[e];
      const FeedForwardSlices& b = sharded.layers()[layer].experts[e];
      EXPECT_TRUE(bytes(fused, a.gate) == bytes(sharded, b.gate)) << layer << " " << e;
      EXPECT_TRUE(bytes(fused, a.up) == bytes(sharded, b.up)) << layer << " " << e;
      EXPECT_TRUE(bytes(fused, a.down) == bytes(sharded, b.down)) << layer << " " << e;
    }
    EXPECT_EQ(fused.layers()[layer].ExpertBytes(), sharded.layers()[layer].ExpertBytes());
    EXPECT_EQ(fused.layers()[layer].CommonBytes(), sharded.layers()[layer].CommonBytes());
  }
}

// The bundled model's README says 3,871,872 parameters, 1.51 M of them active: everything but the
// 6 of 8 experts a token does not use.
TEST_F(ModelTest, CountsParameters) {
  const Model sample = Model::Open(fs::path(WINNOW_SOURCE_DIR) / "examples" / "sample-mixtral");
  EXPECT_EQ(sample.parameter_count(), 3871872u);
  EXPECT_EQ(sample.active_parameter_count(), 3871872u - 4 * 6 * 3 * 128 * 256);
  EXPECT_EQ(sample.lm_head().tensor, sample.embedding().tensor);  // tied
  // Not tied: of the embedding one row is used.
  const Model mixtral = Model::Open(GoldenFolder("mixtral"));
  EXPECT_EQ(mixtral.active_parameter_count(),
            mixtral.parameter_count() - 3 * 4 * 3 * 64 * 24 - 319 * 64);
  const Model deepseek = Model::Open(GoldenFolder("deepseek-bf16"));
  EXPECT_EQ(deepseek.active_parameter_count(),
            deepseek.parameter_count() - 2 * 5 * 3 * 64 * 16 - 319 * 64);
}

TEST_F(ModelTest, GoodFoldersHaveNoFindings) {
  for (const char* name : {"mixtral", "mixtral-bf16-fused", "qwen2_moe", "qwen3_moe-bf16",
                           "qwen3_moe-dense-layer", "olmoe", "deepseek-bf16"}) {
    EXPECT_EQ(Model::Open(GoldenFolder(name)).findings(), std::vector<std::string>{}) << name;
  }
}

TEST_F(ModelTest, ConfigAndTensorsMustAgree) {
  ExpectHas(Refusal("mixtral", [](OrderedJson& c) { c["num_hidden_layers"] = 4; }), "layers.3");
  ExpectHas(Refusal("mixtral", [](OrderedJson& c) { c["num_hidden_layers"] = int64_t{1} << 31; }),
            "num_hidden_layers");
  ExpectHas(Refusal("mixtral", [](OrderedJson& c) { c["num_local_experts"] = 8; }), "gate.weight");
  ExpectHas(Refusal("mixtral", [](OrderedJson& c) { c["vocab_size"] = 640; }), "embed_tokens");
  ExpectHas(Refusal("mixtral", [](OrderedJson& c) { c["hidden_size"] = 32; }), "embed_tokens");
  ExpectHas(Refusal("mixtral", [](OrderedJson& c) { c["intermediate_size"] = 25; }), "w1.weight");
  ExpectHas(Refusal("mixtral", [](OrderedJson& c) { c["num_key_value_heads"] = 4; }), "k_proj");
  ExpectHas(Refusal("mixtral-bf16-fused", [](OrderedJson& c) { c["intermediate_size"] = 12; }),
            "gate_up_proj");
  ExpectHas(Refusal("qwen2_moe", [](OrderedJson& c) { c["shared_expert_intermediate_size"] = 8; }),
            "shared_expert");
  ExpectHas(Refusal("qwen3_moe-bf16", [](OrderedJson& c) { c["head_dim"] = 16; }), "_proj");
  ExpectHas(Refusal("qwen3_moe-dense-layer", [](OrderedJson& c) { c["mlp_only_layers"] = {}; }),
            "layers.1.mlp");
  ExpectHas(Refusal("olmoe", [](OrderedJson& c) { c["attention_bias"] = true; }), "q_proj.bias");
  ExpectHas(Refusal("deepseek-bf16", [](OrderedJson& c) { c["n_shared_experts"] = 1; }),
            "shared_experts");
  // Fewer experts than there are: their tensors would be carried along for nothing.
  const fs::path copy = Copy("olmoe");
  RewriteTensors(copy, [](StoredTensor& t) {
    if (!t.info.name.ends_with("mlp.gate.weight")) return true;
    t.info.shape[0] = 7;
    t.data.resize(t.data.size() / 8 * 7);
    return true;
  });
  EditConfig(copy, [](OrderedJson& c) { c["num_experts"] = 7; });
  ExpectHas(ModelErrorOf([&] { Model::Open(copy); }), "experts.7");
}

TEST_F(ModelTest, MissingAndMisshapenTensorsAreNamed) {
  const std::string expert = "model.layers.1.block_sparse_moe.experts.3.w2.weight";
  fs::path copy = Copy("mixtral");
  RewriteTensors(copy, [&](StoredTensor& t) { return t.info.name != expert; });
  ExpectHas(ModelErrorOf([&] { Model::Open(copy); }), expert);
  copy = Copy("mixtral");
  RewriteTensors(copy, [&](StoredTensor& t) {
    if (t.info.name == expert) std::swap(t.info.shape[0], t.info.shape[1]);
    return true;
  });
  std::string message = ModelErrorOf([&] { Model::Open(copy); });
  ExpectHas(message, expert);
  ExpectHas(message, "[64, 24]");
  ExpectHas(message, "[24, 64]");
  copy = Copy("mixtral");
  RewriteTensors(copy, [&](StoredTensor& t) {
    if (t.info.name == expert) t.info.dtype = Dtype::kI32;
    return true;
  });
  message = ModelErrorOf([&] { Model::Open(copy); });
  ExpectHas(message, expert);
  ExpectHas(message, "I32");
  copy = Copy("mixtral");
  RewriteTensors(copy, [&](StoredTensor& t) { return t.info.name != "lm_head.weight"; });
  ExpectHas(ModelErrorOf([&] { Model::Open(copy); }), "lm_head");
  EditConfig(copy, [](OrderedJson& c) { c["tie_word_embeddings"] = true; });
  EXPECT_NO_THROW(Model::Open(copy));
}

TEST_F(ModelTest, FusedLayoutsAreChecked) {
  const std::string fused = "model.layers.1.mlp.experts.gate_up_proj";
  fs::path copy = Copy("mixtral-bf16-fused");
  RewriteTensors(copy, [&](StoredTensor& t) {
    if (t.info.name == fused) std::swap(t.info.shape[1], t.info.shape[2]);
    return true;
  });
  ExpectHas(ModelErrorOf([&] { Model::Open(copy); }), "transposed");
  copy = Copy("mixtral-bf16-fused");
  RewriteTensors(
      copy, [&](StoredTensor& t) { return t.info.name != "model.layers.1.mlp.experts.down_proj"; });
  ExpectHas(ModelErrorOf([&] { Model::Open(copy); }), "down_proj");
  copy = Copy("mixtral-bf16-fused");
  RewriteTensors(
      copy, KeepAll,
      {Zeros("model.layers.1.block_sparse_moe.experts.0.w1.weight", Dtype::kBF16, {24, 64})});
  ExpectHas(ModelErrorOf([&] { Model::Open(copy); }), "both");
}

TEST_F(ModelTest, OtherTensorsAreFindingsButOldFrequenciesAreNot) {
  const fs::path copy = Copy("mixtral");
  RewriteTensors(copy, KeepAll,
                 {Zeros("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::kF32, {8})});
  EXPECT_EQ(Model::Open(copy).findings().size(), 0u);
  RewriteTensors(copy, KeepAll, {Zeros("value_head.weight", Dtype::kF32, {1, 64})});
  const std::vector<std::string> findings = Model::Open(copy).findings();
  ASSERT_EQ(findings.size(), 1u);
  ExpectHas(findings[0], "value_head.weight");
}

}  // namespace
}  // namespace winnow
