// Quantised checkpoints as files: what is in them, what they compute, and refusal of those that do
// not fit their config.
#include <gtest/gtest.h>

#include <random>
#include <set>

#include "apply/checkpoint_rewriter.h"
#include "base/error.h"
#include "checkpoint/safetensors_writer.h"
#include "doctor/health.h"
#include "forward/test_support.h"
#include "quantize/packed_layout.h"
#include "quantize/quantize_run.h"
#include "quantize/rounding.h"

namespace winnow {
namespace {

PackedFormat Format(const std::string& name) {
  return name.empty() ? PackedFormat{} : *PackedFormatFromName(name);
}

std::string BytesOf(const Model& model, const TensorSlice& slice) {
  std::string bytes(static_cast<size_t>(slice.bytes()), '\0');
  model.checkpoint().ReadPart(*slice.tensor, slice.offset_bytes,
                              std::as_writable_bytes(std::span(bytes)));
  return bytes;
}

std::map<std::string, std::string> TensorsOf(const Model& model) {
  std::map<std::string, std::string> tensors;
  for (const TensorInfo& tensor : model.checkpoint().tensors()) {
    std::string& bytes = tensors[tensor.name];
    bytes.resize(static_cast<size_t>(tensor.bytes));
    model.checkpoint().Read(tensor, std::as_writable_bytes(std::span(bytes)));
  }
  return tensors;
}

// Root of the mean square of the differences, of that of the values.
double RelativeDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, values = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    values += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return std::sqrt(difference / values);
}

// Where the whole message of an Error must have `part`.
template <class E, class Action>
void ExpectRefused(const Action& action, const std::string& part) {
  try {
    action();
    ADD_FAILURE() << "not refused: " << part;
  } catch (const E& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

class PackedCheckpoint : public testing::Test {
 protected:
  fs::path Path(const std::string& name) const { return folder_.path() / name; }

  fs::path Quantise(const fs::path& source, const QuantizePlan& plan, const std::string& out,
                    int threads = 1) const {
    ThreadPool pool(threads);
    RunQuantize(Model::Open(source), plan, Path(out), pool, {});
    return Path(out);
  }
  fs::path Quantise(const fs::path& source, const std::string& experts, const std::string& rest,
                    const std::string& out, int threads = 1) const {
    const Model model = Model::Open(source);
    return Quantise(source, UniformQuantizePlan(model, Format(experts), Format(rest)), out,
                    threads);
  }

  // The original with every packed matrix as the f32 values its bytes stand for.
  fs::path Dequantised(const fs::path& original, const Model& packed, const std::string& out) {
    const Model source = Model::Open(original);
    std::map<std::string, std::vector<float>> values;
    const auto take = [&](const TensorSlice& as_it_was, const TensorSlice& slice) {
      if (slice.packed.empty()) return;
      const std::string bytes = BytesOf(packed, slice);
      std::vector<float>& to = values[as_it_was.tensor->name];
      for (int64_t r = 0; r < slice.rows; ++r) {
        for (int64_t c = 0; c < slice.cols; ++c) {
          to.push_back(LoadPackedValue(slice.packed, slice.cols, r, c,
                                       std::as_bytes(std::span(bytes)).data()));
        }
      }
    };
    const auto take_mlp = [&](const FeedForwardSlices& a, const FeedForwardSlices& b) {
      take(a.gate, b.gate);
      take(a.up, b.up);
      take(a.down, b.down);
    };
    for (size_t l = 0; l < source.layers().size(); ++l) {
      const LayerSlices &a = source.layers()[l], &b = packed.layers()[l];
      take(a.q, b.q);
      take(a.k, b.k);
      take(a.v, b.v);
      take(a.o, b.o);
      for (size_t e = 0; e < a.experts.size(); ++e) take_mlp(a.experts[e], b.experts[e]);
      take_mlp(a.shared, b.shared);
      take_mlp(a.dense, b.dense);
    }
    take(source.lm_head(), packed.lm_head());
    const std::map<std::string, std::string> stored = TensorsOf(source);
    std::vector<TensorData> tensors;
    for (const TensorInfo& tensor : source.checkpoint().tensors()) {
      const auto it = values.find(tensor.name);
      if (it == values.end()) {
        tensors.push_back({tensor.name, tensor.dtype, tensor.shape,
                           std::as_bytes(std::span(stored.at(tensor.name)))});
      } else {
        tensors.push_back(
            {tensor.name, Dtype::kF32, tensor.shape, std::as_bytes(std::span(it->second))});
      }
    }
    fs::create_directories(Path(out));
    WriteSafetensors(Path(out) / "model.safetensors", tensors);
    fs::copy_file(original / "config.json", Path(out) / "config.json");
    return Path(out);
  }

  // Two layers of four experts that take more than kLargeExtentBytes each at 8 bits.
  fs::path LargeModel() const {
    const fs::path path = Path("large");
    fs::create_directories(path);
    constexpr uint64_t kHidden = 256, kWidth = 384, kVocabulary = 64;
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0, 0.05f);
    std::vector<std::vector<uint16_t>> storage;
    std::vector<TensorData> tensors;
    const auto add = [&](const std::string& name, std::vector<uint64_t> shape) {
      uint64_t count = 1;
      for (const uint64_t dim : shape) count *= dim;
      std::vector<uint16_t> values(count);
      for (uint16_t& v : values) v = Bf16FromFloat(normal(random));
      storage.push_back(std::move(values));
      tensors.push_back({name, Dtype::kBF16, std::move(shape), {}});
    };
    for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
      add(layer + "input_layernorm.weight", {kHidden});
      add(layer + "post_attention_layernorm.weight", {kHidden});
      for (const char* name : {"q", "k", "v", "o"}) {
        add(layer + "self_attn." + name + "_proj.weight", {kHidden, kHidden});
      }
      add(layer + "block_sparse_moe.gate.weight", {4, kHidden});
      for (const std::string e : {"0", "1", "2", "3"}) {
        const std::string expert = layer + "block_sparse_moe.experts." + e;
        add(expert + ".w1.weight", {kWidth, kHidden});
        add(expert + ".w2.weight", {kHidden, kWidth});
        add(expert + ".w3.weight", {kWidth, kHidden});
      }
    }
    add("model.embed_tokens.weight", {kVocabulary, kHidden});
    add("model.norm.weight", {kHidden});
    add("lm_head.weight", {kVocabulary, kHidden});
    for (size_t i = 0; i < tensors.size(); ++i) {
      tensors[i].data = std::as_bytes(std::span(storage[i]));
    }
    WriteSafetensors(path / "model.safetensors", tensors);
    OrderedJson config = ReadConfig(GoldenFolder("mixtral"));
    config["hidden_size"] = kHidden;
    config["intermediate_size"] = kWidth;
    config["vocab_size"] = kVocabulary;
    config["num_key_value_heads"] = 4;
    config["num_hidden_layers"] = 2;
    config["num_local_experts"] = 4;
    WriteFileAtomically(path / "config.json", config.dump());
    return path;
  }

  const TestFolder folder_;
};

// Every family: logits are those of the values the bytes stand for, and with 8 bits near the
// original's.
class PackedFamilies : public PackedCheckpoint, public testing::WithParamInterface<const char*> {};

TEST_P(PackedFamilies, ComputesWhatItsBytesStandFor) {
  const fs::path original = GoldenFolder(GetParam());
  const TokenSet tokens = GoldenTokens(GetParam());
  const Model source = Model::Open(original);
  const ForwardTrace before = RunForward(source, tokens);
  for (const char* format : {"8bit", "4bit-asym-g64"}) {
    const Model packed = Model::Open(Quantise(original, format, "8bit", format));
    EXPECT_EQ(packed.findings(), std::vector<std::string>{});
    EXPECT_EQ(packed.parameter_count(), source.parameter_count());
    EXPECT_EQ(packed.active_parameter_count(), source.active_parameter_count());
    EXPECT_LT(packed.checkpoint().total_bytes(), source.checkpoint().total_bytes());
    const ForwardTrace after = RunForward(packed, tokens);
    // A packed matrix gives the bits of its values in f32; where those go to a kernel of few rows
    // sums are in another order.
    const Model values =
        Model::Open(Dequantised(original, packed, std::string(format) + "-values"));
    EXPECT_LT(MaxDifference(after.logits, RunForward(values, tokens).logits), 2e-4) << format;
    if (std::string(format) == "8bit") {
      // Mostly of a few tokens that choose another expert where two are nearly equal; matrices in a
      // wrong order or scale would make it about 1.
      EXPECT_LT(RelativeDifference(after.logits, before.logits), 0.08);
      EXPECT_GT(RelativeDifference(after.logits, before.logits), 1e-4);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, PackedFamilies,
                         testing::Values("mixtral", "qwen2_moe", "qwen3_moe-bf16",
                                         "qwen3_moe-dense-layer", "olmoe", "deepseek-bf16"),
                         TestName);

TEST_F(PackedCheckpoint, BytesAreThoseOfTheRounding) {
  const Model source = Model::Open(GoldenFolder("mixtral"));
  const Model packed = Model::Open(Quantise(GoldenFolder("mixtral"), "3bit-g128", "", "out"));
  ThreadPool pool(1);
  const TensorSlice& down = source.layers()[1].experts[4].down;
  const std::vector<float> w = ReadArray<float>(
      SafetensorsFile::Open(GoldenFolder("mixtral") / "model.safetensors"), down.tensor->name);
  std::string expected(PackedBytes(Format("3bit-g128"), down.rows, down.cols), '\0');
  RoundPlain(w.data(), down.rows, down.cols, Format("3bit-g128"), {},
             std::as_writable_bytes(std::span(expected)).data(), pool);
  EXPECT_TRUE(BytesOf(packed, packed.layers()[1].experts[4].down) == expected);
  // What is not packed is carried through, and the card and the record say what was done.
  EXPECT_TRUE(BytesOf(packed, packed.layers()[1].q) == BytesOf(source, source.layers()[1].q));
  EXPECT_TRUE(BytesOf(packed, packed.lm_head()) == BytesOf(source, source.lm_head()));
  const std::string card = ReadTextFile(Path("out") / "README.md");
  EXPECT_NE(card.find("| experts | 3bit-g128 | 54 |"), std::string::npos) << card;
  const Json record = ParseJson(ReadTextFile(Path("out") / "winnow-quantize.json"), "record");
  EXPECT_EQ(record["bytes_after"], packed.checkpoint().total_bytes());
  EXPECT_EQ(record["model"]["fingerprint"], source.checkpoint().FingerprintHex());
  EXPECT_FALSE(fs::exists(Path("out.partial")));
}

TEST_F(PackedCheckpoint, ExtentsAreAlignedAndFollowEachOther) {
  const Model large = Model::Open(Quantise(LargeModel(), "8bit", "6bit", "large-8bit"));
  const Model small = Model::Open(Quantise(GoldenFolder("mixtral"), "4bit", "", "small"));
  for (const auto& [model, alignment] :
       {std::pair(&large, kExtentAlignment), std::pair(&small, kPackedAlignment)}) {
    std::set<std::string> seen;
    uint64_t end = 0;
    for (size_t l = 0; l < model->layers().size(); ++l) {
      for (size_t e = 0; e < model->layers()[l].experts.size(); ++e) {
        const FeedForwardSlices& expert = model->layers()[l].experts[e];
        const TensorInfo& tensor = *expert.gate.tensor;
        EXPECT_EQ(tensor.name,
                  model->PackedExpertName(static_cast<int64_t>(l), static_cast<int64_t>(e)));
        EXPECT_EQ(tensor.file_offset % alignment, 0u) << tensor.name;
        EXPECT_EQ(tensor.bytes % alignment, 0u) << tensor.name;
        EXPECT_EQ(tensor.file_offset, end == 0 ? tensor.file_offset : end) << tensor.name;
        end = tensor.file_offset + tensor.bytes;
        // gate, up, down without gaps, then zeros.
        EXPECT_EQ(expert.up.offset_bytes, expert.gate.bytes());
        EXPECT_EQ(expert.down.offset_bytes, 2 * expert.gate.bytes());
        std::string bytes(static_cast<size_t>(tensor.bytes), '\1');
        model->checkpoint().Read(tensor, std::as_writable_bytes(std::span(bytes)));
        const size_t used = expert.down.offset_bytes + expert.down.bytes();
        EXPECT_LT(bytes.size() - used, alignment);
        EXPECT_EQ(bytes.find_first_not_of('\0', used), std::string::npos) << tensor.name;
      }
    }
  }
  // Other packed matrices too.
  for (const LayerSlices& layer : large.layers()) {
    EXPECT_EQ(layer.o.tensor->file_offset % kPackedAlignment, 0u);
    EXPECT_EQ(layer.o.tensor->name.substr(15), "self_attn.o_proj.packed");
  }
}

TEST_F(PackedCheckpoint, AnyNumberOfThreadsWritesTheSameBytes) {
  const fs::path one = Quantise(GoldenFolder("qwen2_moe"), "4bit", "8bit", "one", 1);
  const fs::path three = Quantise(GoldenFolder("qwen2_moe"), "4bit", "8bit", "three", 3);
  ExpectSameContent(one, three);
}

TEST_F(PackedCheckpoint, SizesAreKnownBeforehand) {
  const Model source = Model::Open(LargeModel());
  QuantizePlan plan = UniformQuantizePlan(source, Format("5bit"), Format("7bit"));
  plan.layers[0].experts[2] = {};
  plan.layers[1].experts[0] = Format("2bit-log");
  const QuantizeEstimate estimate = EstimateQuantize(source, plan);
  const Model packed = Model::Open(Quantise(Path("large"), plan, "out"));
  EXPECT_EQ(QuantizedBytes(source, plan), packed.checkpoint().total_bytes());
  EXPECT_EQ(estimate.bytes_after, packed.checkpoint().total_bytes());
  EXPECT_TRUE(packed.layers()[0].experts[2].gate.packed.empty());
  EXPECT_TRUE(BytesOf(packed, packed.layers()[0].experts[2].up) ==
              BytesOf(source, source.layers()[0].experts[2].up));
  EXPECT_EQ(packed.layers()[1].experts[0].up.packed, Format("2bit-log"));
}

// Pruning and packing can be done in either order.
TEST_F(PackedCheckpoint, PruningAPackedModelIsPackingAPrunedOne) {
  for (const char* name : {"mixtral", "qwen3_moe-dense-layer", "deepseek-bf16"}) {
    const Model source = Model::Open(GoldenFolder(name));
    CompressionPlan prune;
    for (const int32_t layer : source.config().MoeLayers()) {
      const int64_t experts = source.config().layers[static_cast<size_t>(layer)].num_experts;
      LayerPlan& plan = prune.layers.emplace_back();
      plan.layer = layer;
      plan.num_experts = experts;
      plan.kept = {0, 2, 3, 5};
      plan.dropped = OtherExperts(plan.kept, experts);
    }
    const auto apply = [&](const Model& model, const fs::path& out) {
      ApplyPlan(model, prune, PlanRewrite(model, prune, {}), {}, out, {});
    };
    QuantizePlan whole = UniformQuantizePlan(source, Format("4bit"), Format("8bit"));
    for (LayerFormats& layer : whole.layers) {  // each expert another
      for (size_t e = 0; e < layer.experts.size(); ++e) {
        layer.experts[e] =
            e == 3 ? PackedFormat{} : PackedFormat{.bits = 2 + static_cast<int>(e % 7)};
      }
    }
    const std::string folder = name;
    Quantise(GoldenFolder(name), whole, folder + "-packed");
    apply(Model::Open(Path(folder + "-packed")), Path(folder + "-packed-pruned"));
    apply(source, Path(folder + "-pruned"));
    QuantizePlan kept = whole;
    for (LayerFormats& layer : kept.layers) {
      if (layer.experts.empty()) continue;
      layer.experts = {layer.experts[0], layer.experts[2], layer.experts[3], layer.experts[5]};
    }
    Quantise(Path(folder + "-pruned"), kept, folder + "-pruned-packed");
    const Model a = Model::Open(Path(folder + "-packed-pruned"));
    const Model b = Model::Open(Path(folder + "-pruned-packed"));
    EXPECT_TRUE(TensorsOf(a) == TensorsOf(b)) << name;
    EXPECT_EQ(ReadConfig(a.checkpoint().folder()).dump(),
              ReadConfig(b.checkpoint().folder()).dump());
    for (const TensorInfo& tensor : a.checkpoint().tensors()) {
      if (!tensor.name.ends_with(".packed")) continue;
      EXPECT_EQ(tensor.file_offset % kPackedAlignment, 0u) << tensor.name;
    }
  }
}

// Layers that hold all experts in one tensor are taken apart; those the plan keeps too.
TEST_F(PackedCheckpoint, FusedExpertsBecomeSingleOnes) {
  const Model fused = Model::Open(GoldenFolder("mixtral-bf16-fused"));
  QuantizePlan plan = UniformQuantizePlan(fused, Format("8bit"), {});
  plan.layers[1].experts[4] = {};
  plan.layers[2].experts.clear();
  const Model a = Model::Open(Quantise(GoldenFolder("mixtral-bf16-fused"), plan, "fused"));
  const Model b = Model::Open(Quantise(GoldenFolder("mixtral-bf16-sharded"), plan, "sharded"));
  EXPECT_NE(a.checkpoint().Find("model.layers.2.mlp.experts.gate_up_proj"), nullptr);
  EXPECT_EQ(a.checkpoint().Find("model.layers.1.mlp.experts.gate_up_proj"), nullptr);
  EXPECT_EQ(a.findings(), std::vector<std::string>{});
  const TokenSet tokens = GoldenTokens("mixtral-bf16-fused");
  EXPECT_EQ(RunForward(a, tokens).logits, RunForward(b, tokens).logits);
}

// A second run packs what the first has left, and rounds nothing twice.
TEST_F(PackedCheckpoint, TheRestCanBePackedLater) {
  const fs::path both = Quantise(GoldenFolder("qwen2_moe"), "4bit", "8bit", "both");
  const fs::path first = Quantise(GoldenFolder("qwen2_moe"), "4bit", "", "first");
  const fs::path second = Quantise(first, "", "8bit", "second");
  EXPECT_TRUE(TensorsOf(Model::Open(both)) == TensorsOf(Model::Open(second)));
  EXPECT_EQ(ReadConfig(both).dump(), ReadConfig(second).dump());
  ExpectRefused<UsageError>([&] { Quantise(first, "4bit", "8bit", "twice"); }, "packed already");
}

TEST_F(PackedCheckpoint, PlansThatDoNotFitAreRefused) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  const QuantizePlan good = UniformQuantizePlan(model, Format("4bit"), Format("8bit"));
  EXPECT_NO_THROW(CheckQuantizePlan(model, good));
  QuantizePlan bad = good;
  bad.layers.pop_back();
  ExpectRefused<UsageError>([&] { CheckQuantizePlan(model, bad); }, "2 layers");
  bad = good;
  bad.layers[1].experts.pop_back();
  ExpectRefused<UsageError>([&] { CheckQuantizePlan(model, bad); }, "5 experts");
  bad = good;
  bad.layers[1].shared = Format("8bit");
  ExpectRefused<UsageError>([&] { CheckQuantizePlan(model, bad); }, "shared expert");
  bad = good;
  bad.layers[0].attention = {.bits = 4, .group_columns = 48};
  ExpectRefused<UsageError>([&] { CheckQuantizePlan(model, bad); }, "no packed format");
  ExpectRefused<UsageError>([&] { EstimateQuantize(model, UniformQuantizePlan(model, {}, {})); },
                            "nothing to quantise");
  const Model tied = Model::Open(fs::path(WINNOW_SOURCE_DIR) / "examples" / "sample-mixtral");
  QuantizePlan head = UniformQuantizePlan(tied, {}, Format("8bit"));
  EXPECT_TRUE(head.lm_head.empty());
  head.lm_head = Format("8bit");
  ExpectRefused<UsageError>([&] { CheckQuantizePlan(tied, head); }, "embedding");
}

TEST_F(PackedCheckpoint, FilesThatDoNotFitTheirConfigAreRefused) {
  const fs::path good = Quantise(GoldenFolder("mixtral"), "4bit", "8bit", "good");
  const auto refusal = [&](const std::function<void(OrderedJson&)>& edit) {
    fs::remove_all(Path("bad"));
    CopyFolder(good, Path("bad"));
    EditConfig(Path("bad"), edit);
    return ModelErrorOf([&] { Model::Open(Path("bad")); });
  };
  const auto has = [](const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  has(refusal([](OrderedJson& c) { c.erase("quantization_config"); }), "lm_head.packed exists");
  has(refusal([](OrderedJson& c) { c["quantization_config"]["layers"][1]["experts"] = "3bit"; }),
      "expected U8");
  has(refusal([](OrderedJson& c) { c["quantization_config"]["layers"][1].erase("experts"); }),
      "experts.0.packed exists");
  has(refusal([](OrderedJson& c) { c["quantization_config"]["layers"][0]["attention"] = "4bit"; }),
      "q_proj.packed: expected U8");
  has(refusal([](OrderedJson& c) { c["quantization_config"].erase("lm_head"); }),
      "lm_head.packed exists");
  has(refusal([](OrderedJson& c) { c["num_local_experts"] = 5; }), "gate.weight");
  has(refusal([](OrderedJson& c) { c["intermediate_size"] = 40; }), "expected U8");
  // A model that was never packed, with a config that says so.
  const OrderedJson section = ReadConfig(good)["quantization_config"];
  CopyFolder(GoldenFolder("mixtral"), Path("unpacked"));
  EditConfig(Path("unpacked"), [&](OrderedJson& c) { c["quantization_config"] = section; });
  has(ModelErrorOf([&] { Model::Open(Path("unpacked")); }), "exists, but");
  // A file that ends early.
  fs::remove_all(Path("bad"));
  CopyFolder(good, Path("bad"));
  fs::resize_file(Path("bad") / "model.safetensors",
                  fs::file_size(Path("bad") / "model.safetensors") - 64);
  ModelErrorOf([&] { Model::Open(Path("bad")); });
}

TEST_F(PackedCheckpoint, AnUnfinishedWriterLeavesNothing) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  const QuantizePlan plan = UniformQuantizePlan(model, Format("4bit"), {});
  const TensorSlice& gate = model.layers()[0].experts[0].gate;
  const std::vector<std::byte> inner(PackedBytes(Format("4bit"), gate.rows, gate.cols));
  const std::vector<std::byte> down(PackedBytes(Format("4bit"), gate.cols, gate.rows));
  fs::create_directories(Path("out.partial"));
  WriteFileAtomically(Path("out.partial") / "old", "of an earlier run");
  {
    PackedCheckpointWriter writer(model, plan, Path("out"));
    EXPECT_FALSE(fs::exists(Path("out.partial") / "old"));
    EXPECT_TRUE(fs::exists(Path("out.partial") / "model.safetensors"));
    writer.WriteExpert(0, 0, inner, inner, down);
    ExpectRefused<RuntimeError>([&] { writer.WriteExpert(0, 0, inner, inner, down); }, "twice");
    ExpectRefused<RuntimeError>([&] { writer.WriteExpert(0, 1, inner, down, inner); }, "expected");
    ExpectRefused<RuntimeError>([&] { writer.WriteMatrix(0, PackedMatrix::kQ, inner); }, "keeps");
    ExpectRefused<RuntimeError>([&] { writer.Finish("", {}, {}); }, "was not written");
  }
  EXPECT_FALSE(fs::exists(Path("out.partial")));
  EXPECT_FALSE(fs::exists(Path("out")));
  // Ctrl-C.
  const std::atomic<bool> interrupted{true};
  JobControl control;
  control.interrupted = &interrupted;
  ThreadPool pool(1);
  EXPECT_THROW(RunQuantize(model, plan, Path("out"), pool, control), InterruptedError);
  EXPECT_FALSE(fs::exists(Path("out.partial")));
}

TEST_F(PackedCheckpoint, WeightsThatAreNoNumbersAreNamed) {
  CopyFolder(GoldenFolder("mixtral"), Path("nan"));
  const Model model = Model::Open(Path("nan"));
  const TensorInfo& tensor = *model.layers()[2].experts[1].up.tensor;
  const float nan = std::nanf("");
  File::OpenWrite(Path("nan") / "model.safetensors")
      .WriteAt(tensor.file_offset + 40, std::as_bytes(std::span(&nan, 1)));
  ExpectRefused<ModelError>([&] { Quantise(Path("nan"), "4bit", "", "out"); }, tensor.name);
}

TEST_F(PackedCheckpoint, DoctorLooksAtScales) {
  const fs::path good = Quantise(GoldenFolder("mixtral"), "4bit", "8bit", "good");
  ThreadPool pool(1);
  EXPECT_EQ(CheckPath(good, true, pool, {}).findings, std::vector<std::string>{});
  const Model model = Model::Open(good);
  const TensorSlice& down = model.layers()[1].experts[2].down;
  const uint16_t infinity = 0x7c00;
  File::OpenWrite(good / "model.safetensors")
      .WriteAt(down.tensor->file_offset + down.offset_bytes,
               std::as_bytes(std::span(&infinity, 1)));
  const std::vector<std::string> findings = CheckPath(good, true, pool, {}).findings;
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_NE(findings[0].find(down.tensor->name), std::string::npos) << findings[0];
}

TEST_F(PackedCheckpoint, WhatNeedsSingleWeightsSaysSo) {
  const Model packed = Model::Open(Quantise(GoldenFolder("qwen2_moe"), "4bit", "", "packed"));
  CompressionPlan plan;
  for (const int32_t layer : packed.config().MoeLayers()) {
    LayerPlan& of = plan.layers.emplace_back();
    of.layer = layer;
    of.num_experts = packed.config().layers[static_cast<size_t>(layer)].num_experts;
    for (int32_t e = 0; e < plan.layers.back().num_experts; ++e) {
      plan.layers.back().kept.push_back(e);
    }
  }
  ApplyOptions options;
  options.export_code = true;
  ExpectRefused<UsageError>([&] { PlanRewrite(packed, plan, options); }, "--export-code");
  plan.layers[0].kept = {0};
  plan.layers[0].dropped = OtherExperts({0}, plan.layers[0].num_experts);
  plan.layers[0].condensed.emplace();
  plan.layers[0].condensed->experts = {0};
  plan.layers[0].condensed->alphas.resize(static_cast<size_t>(plan.layers[0].num_experts), 0.1);
  ExpectRefused<UsageError>([&] { PlanRewrite(packed, plan, {}); }, "condensed");
}

}  // namespace
}  // namespace winnow
