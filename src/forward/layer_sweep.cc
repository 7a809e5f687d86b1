#include "forward/layer_sweep.h"

#include <algorithm>

#include "weights/layer_reader.h"

namespace winnow {

std::vector<SequenceTile> SplitIntoTiles(const TokenSet& tokens, int64_t tile_tokens) {
  std::vector<SequenceTile> tiles;
  for (int64_t s = 0; s < tokens.num_sequences(); ++s) {
    const int64_t length = tokens.length(s);
    if (tiles.empty() || tiles.back().num_tokens + length > tile_tokens) {
      tiles.push_back({s, 0, tokens.offsets[static_cast<size_t>(s)], 0, {}});
    }
    SequenceTile& tile = tiles.back();
    ++tile.num_sequences;
    tile.num_tokens += length;
    tile.lengths.push_back(length);
  }
  return tiles;
}

int64_t LargestTile(const TokenSet& tokens) {
  int64_t largest = 0;
  for (const SequenceTile& tile : SplitIntoTiles(tokens, kTileTokens)) {
    largest = std::max(largest, tile.num_tokens);
  }
  return largest;
}

std::unique_ptr<HiddenStates> MakeStream(const TokenSet& tokens, int64_t hidden,
                                         const fs::path& spill) {
  if (spill.empty()) return std::make_unique<HiddenStates>(tokens.num_tokens(), hidden);
  auto stream =
      std::make_unique<HiddenStates>(tokens.num_tokens(), hidden, LargestTile(tokens), spill);
  fs::remove(spill);
  return stream;
}

LayerSweep::LayerSweep(const Model& model, const TokenSet& tokens, ThreadPool& pool,
                       const JobControl& control, std::string stage, ComputePrecision precision)
    : model_(model),
      tokens_(tokens),
      control_(control),
      stage_(std::move(stage)),
      tiles_(SplitIntoTiles(tokens, kTileTokens)),
      attention_(model.config(), pool, precision),
      feed_forward_(model.config(), pool, precision),
      work_total_(tokens.num_tokens() * model.config().num_layers()) {}

void LayerSweep::Embed(HiddenStates& states) {
  if (!states.spilled()) {
    LoadEmbeddings(model_, tokens_.ids, states.Load(0, tokens_.num_tokens()));
    return;
  }
  for (const SequenceTile& tile : tiles_) {
    control_.Poll();
    float* hidden = states.Load(tile.first_token, tile.num_tokens);
    LoadEmbeddings(
        model_,
        std::span(tokens_.ids)
            .subspan(static_cast<size_t>(tile.first_token), static_cast<size_t>(tile.num_tokens)),
        hidden);
    states.Store(tile.first_token, tile.num_tokens);
  }
}

void LayerSweep::RunLayer(int64_t layer, const LayerWeights& weights, HiddenStates& states,
                          MoeObserver* observer) {
  for (const SequenceTile& tile : tiles_) {
    float* hidden = states.Load(tile.first_token, tile.num_tokens);
    RunAttention(weights, tile, hidden);
    RunFeedForward(weights, {.layer = layer, .first_token = tile.first_token, .observer = observer},
                   tile.num_tokens, hidden);
    states.Store(tile.first_token, tile.num_tokens);
    Advance(layer, tile.num_tokens);
  }
}

void LayerSweep::RunAttention(const LayerWeights& weights, const SequenceTile& tile,
                              float* hidden) {
  control_.Poll();
  attention_.Run(weights, tile.lengths, hidden);
}

void LayerSweep::RunFeedForward(const LayerWeights& weights, const FeedForwardCall& call,
                                int64_t num_tokens, float* hidden) {
  control_.Poll();
  feed_forward_.Run(weights, call, num_tokens, hidden);
}

void LayerSweep::Advance(int64_t layer, int64_t tokens) {
  work_done_ += tokens;
  control_.Report({.stage = stage_,
                   .layer = layer,
                   .num_layers = model_.config().num_layers(),
                   .work_done = work_done_,
                   .work_total = work_total_});
}

uint64_t LayerSweep::ScratchBytes(const Model& model, const TokenSet& tokens, bool all_experts,
                                  int num_threads) {
  return AttentionBlock::ScratchBytes(model.config(), LargestTile(tokens), tokens.longest(),
                                      num_threads) +
         FeedForwardBlock::ScratchBytes(model.config(), all_experts);
}

}  // namespace winnow
