// One MoE layer of `observe --method condense`: its tokens go through, and the neurons (or, on
// large layers, the experts) of a dense replacement are chosen.
#pragma once

#include <cstdint>

#include "base/progress.h"            // JobControl
#include "base/thread_pool.h"         // ThreadPool
#include "condense/condense_stats.h"  // CondenseLayer
#include "forward/layer_sweep.h"      // LayerSweep

namespace winnow {

struct NeuronWidth {
  int64_t width = 0;         // experts' worth of neurons
  int64_t most_neurons = 0;  // see CandidateNeurons
};

// Advances `stream` through the layer.
CondenseLayer ChooseLayerNeurons(const Model& model, int64_t layer, const LayerWeights& weights,
                                 const NeuronWidth& most, LayerSweep& sweep, HiddenStates& stream,
                                 ThreadPool& pool, const JobControl& control);
// What it holds besides the layer and the stream.
uint64_t NeuronPassBytes(const ModelConfig& config, const LayerConfig& layer,
                         const NeuronWidth& most, int64_t tile_tokens);

}  // namespace winnow
