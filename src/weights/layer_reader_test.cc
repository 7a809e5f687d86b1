// Layers read from disk: the same bytes in every mode, subsets of experts, errors that surface.
#include "weights/layer_reader.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "model/test_support.h"

namespace winnow {
namespace {

std::string Bytes(const WeightMatrix& matrix) {
  return {reinterpret_cast<const char*>(matrix.data), static_cast<size_t>(matrix.bytes())};
}

std::string Stored(const Model& model, const TensorSlice& slice) {
  std::string bytes(static_cast<size_t>(slice.bytes()), '\0');
  model.checkpoint().ReadPart(*slice.tensor, slice.offset_bytes,
                              std::as_writable_bytes(std::span(bytes)));
  return bytes;
}

// Every matrix of `layer` with experts `kept` against the file.
void ExpectLayer(const Model& model, int64_t layer, const LayerWeights& weights,
                 const std::vector<int32_t>& kept) {
  SCOPED_TRACE(layer);
  const LayerSlices& slices = model.layers()[static_cast<size_t>(layer)];
  const auto expect = [&](const TensorSlice& slice, const WeightMatrix& matrix) {
    ASSERT_EQ(slice.exists(), !matrix.empty());
    if (!slice.exists()) return;
    EXPECT_EQ(matrix.rows, slice.rows);
    EXPECT_EQ(matrix.cols, slice.cols);
    EXPECT_TRUE(Bytes(matrix) == Stored(model, slice)) << slice.tensor->name;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(matrix.data) % 64, 0u);
  };
  expect(slices.q, weights.q);
  expect(slices.k, weights.k);
  expect(slices.v, weights.v);
  expect(slices.o, weights.o);
  expect(slices.shared.gate, weights.shared.gate);
  expect(slices.shared.down, weights.shared.down);
  expect(slices.shared_router, weights.shared_router);
  expect(slices.dense.up, weights.dense.up);
  ASSERT_EQ(weights.num_experts(), static_cast<int64_t>(kept.size()));
  std::string router;
  for (size_t i = 0; i < kept.size(); ++i) {
    const auto e = static_cast<size_t>(kept[i]);
    expect(slices.experts[e].gate, weights.experts[i].gate);
    expect(slices.experts[e].up, weights.experts[i].up);
    expect(slices.experts[e].down, weights.experts[i].down);
    const std::string rows = Stored(model, slices.router);
    const size_t row = rows.size() / static_cast<size_t>(slices.router.rows);
    router += rows.substr(e * row, row);
  }
  EXPECT_EQ(weights.router.empty(), kept.empty());
  if (!kept.empty()) {
    EXPECT_TRUE(Bytes(weights.router) == router);
  }
  EXPECT_EQ(weights.input_norm.size(), static_cast<size_t>(model.config().hidden_size));
  EXPECT_EQ(weights.q_bias.empty(), !model.config().qkv_bias);
  EXPECT_EQ(weights.q_norm.empty(), model.config().qk_norm == QkNorm::kNone);
}

std::vector<int32_t> AllExperts(const Model& model, int64_t layer) {
  std::vector<int32_t> all;
  for (int32_t e = 0; e < model.config().layers[static_cast<size_t>(layer)].num_experts; ++e) {
    all.push_back(e);
  }
  return all;
}

TEST(LayerReader, ReadsTheSameInEveryModeAndOrder) {
  for (const char* name :
       {"mixtral-bf16-fused", "qwen2_moe", "qwen3_moe-dense-layer", "deepseek-bf16"}) {
    SCOPED_TRACE(name);
    const Model model = Model::Open(GoldenFolder(name));
    for (const LayerReaderOptions& options :
         {LayerReaderOptions{.prefetch = false}, LayerReaderOptions{.prefetch = true},
          LayerReaderOptions{.prefetch = false, .keep_resident = true}}) {
      LayerReader reader(model, options);
      // Ascending, again from the start, the same twice, backwards.
      for (const int64_t layer : {0, 1, 2, 0, 1, 1, 2, 1, 0, 2}) {
        ExpectLayer(model, layer, reader.Get(layer), AllExperts(model, layer));
      }
    }
  }
}

TEST(LayerReader, ReadsOnlyTheExpertsKept) {
  for (const char* name : {"mixtral-bf16-fused", "mixtral-bf16-sharded", "olmoe"}) {
    const Model model = Model::Open(GoldenFolder(name));
    LayerReaderOptions options{.kept_experts = {{1, 4}, {}, {0, 2, 5}}};
    LayerReader reader(model, options);
    ExpectLayer(model, 0, reader.Get(0), {1, 4});
    ExpectLayer(model, 1, reader.Get(1), AllExperts(model, 1));  // empty: all
    ExpectLayer(model, 2, reader.Get(2), {0, 2, 5});
    options.prefetch = false;
    LayerReader direct(model, options);
    uint64_t expected = 0;
    for (int64_t layer = 0; layer < 3; ++layer) {
      const LayerWeights& weights = direct.Get(layer);
      for (const WeightMatrix* matrix :
           {&weights.q, &weights.k, &weights.v, &weights.o, &weights.router}) {
        expected += matrix->bytes();
      }
      for (const FeedForwardWeights& expert : weights.experts) {
        expected += expert.gate.bytes() + expert.up.bytes() + expert.down.bytes();
      }
    }
    EXPECT_EQ(direct.bytes_read(), expected);
    EXPECT_LT(LayerReader::AllLayersBytes(model, options), LayerReader::AllLayersBytes(model, {}));
    EXPECT_LE(LayerReader::LargestLayerBytes(model, options),
              LayerReader::LargestLayerBytes(model, {}));
  }
}

// What a pruned layer computes with: as if it had been read with those experts alone.
TEST(LayerWeights, WithExpertsIsWhatReadingThemGives) {
  const Model model = Model::Open(GoldenFolder("olmoe"));
  LayerReader reader(model, {.prefetch = false});
  AlignedBuffer<std::byte> router_rows;
  const LayerWeights pruned = reader.Get(1).WithExperts({0, 3, 7}, router_rows);
  ExpectLayer(model, 1, pruned, {0, 3, 7});
}

TEST(LayerReader, ResidentLayersAreReadOnce) {
  const Model model = Model::Open(GoldenFolder("olmoe"));
  LayerReader reader(model, {.keep_resident = true});
  for (const int64_t layer : {0, 1, 2}) reader.Get(layer);
  const uint64_t once = reader.bytes_read();
  const LayerWeights* first = &reader.Get(0);
  for (const int64_t layer : {0, 1, 2}) reader.Get(layer);
  EXPECT_EQ(reader.bytes_read(), once);
  EXPECT_EQ(&reader.Get(0), first);
}

TEST(LayerReader, ErrorsOfTheBackgroundReadSurface) {
  const TestFolder folder;
  const fs::path copy = CopyFolder(GoldenFolder("mixtral-bf16-sharded"), folder.path() / "model");
  const Model model = Model::Open(copy);
  {
    LayerReader reader(model, {.prefetch = true});
    fs::resize_file(copy / "model-00003-of-00003.safetensors", 8000);
    // The last shard is needed for a later layer: whoever asks for it hears of it.
    EXPECT_THROW(
        {
          for (const int64_t layer : {0, 1, 2, 0, 1, 2}) reader.Get(layer);
        },
        Error);
  }
  LayerReader direct(model, {.prefetch = false});
  EXPECT_THROW(
      {
        for (const int64_t layer : {0, 1, 2}) direct.Get(layer);
      },
      Error);
}

TEST(LoadEmbeddings, GivesTheRowsOfAnyIds) {
  const Model model = Model::Open(GoldenFolder("mixtral-bf16-sharded"));
  const std::vector<int32_t> ids = {319, 0, 5, 5, 319, 7};
  std::vector<float> rows(ids.size() * 64);
  LoadEmbeddings(model, ids, rows.data());
  const std::string stored = Stored(model, model.embedding());
  for (size_t i = 0; i < ids.size(); ++i) {
    for (size_t c = 0; c < 64; ++c) {
      EXPECT_EQ(rows[i * 64 + c], LoadAsFloat(Dtype::kBF16, std::as_bytes(std::span(stored)).data(),
                                              static_cast<size_t>(ids[i]) * 64 + c));
    }
  }
  for (const int32_t id : {-1, 320, INT32_MAX, INT32_MIN}) {
    EXPECT_THROW(LoadEmbeddings(model, std::span(&id, 1), rows.data()), UsageError);
  }
}

TEST(LoadRows, TakesAPartOfAMatrix) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  const LoadedMatrix part = LoadRows(model, model.lm_head(), 100, 20);
  EXPECT_EQ(part.matrix.rows, 20);
  EXPECT_TRUE(Bytes(part.matrix) ==
              Stored(model, model.lm_head()).substr(100 * 64 * 4, 20 * 64 * 4));
}

}  // namespace
}  // namespace winnow
