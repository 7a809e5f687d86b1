// How others watch a MoE layer without the forward pass knowing who they are: statistics (observe/)
// and traces (cli/) implement MoeObserver. Called once per run of tokens, in token order, on the
// caller's thread; pointers are valid during the call.
#pragma once

#include <cstdint>
#include <vector>

namespace winnow {

struct MoeTokens {
  int64_t layer = 0;        // decoder index
  int64_t first_token = 0;  // position in the whole token set
  int64_t num_tokens = 0;   // n below
  int64_t hidden = 0;
  int64_t num_experts = 0;                // E
  int64_t num_experts_per_tok = 0;        // k
  const float* residual = nullptr;        // [n, hidden] stream before the feed-forward block
  const float* input = nullptr;           // [n, hidden] normed, what router and experts see
  const float* router_logits = nullptr;   // [n, E]
  const int32_t* topk_ids = nullptr;      // [n, k] highest probability first; ~id: skipped
  const float* topk_weights = nullptr;    // [n, k] as multiplied into the expert outputs
  const float* routed = nullptr;          // [n, hidden] weighted sum of the routed experts
  const float* output = nullptr;          // [n, hidden] routed + shared
  const float* expert_outputs = nullptr;  // [n, E, hidden]; null unless asked for
  // [n, k] rows of hidden, output of each selected expert before its weight; null unless asked for.
  const float* selected_outputs = nullptr;
};

// What the down projection of one expert multiplies: inner = silu(gate) * up of some of the tokens
// that use it, in token order.
inline constexpr int32_t kSharedPart = -1;
inline constexpr int32_t kDensePart = -2;
struct ExpertRows {
  int64_t layer = 0;
  int32_t expert = 0;                // or kSharedPart, kDensePart
  int64_t num_rows = 0;              // n below
  int64_t width = 0;                 // of the expert
  const float* gate = nullptr;       // [n, width] outputs of the two projections
  const float* up = nullptr;         // [n, width]
  std::vector<int64_t> tokens = {};  // [n] positions in the whole token set
  std::vector<float> weights = {};   // [n] what the output of the expert is multiplied by
};

class MoeObserver {
 public:
  virtual ~MoeObserver() = default;
  // True: all E experts run on every token and expert_outputs is set.
  virtual bool WantsExpertOutputs() const { return false; }
  virtual bool WantsSelectedOutputs() const { return false; }
  // True: OnExpertRows is called for every run of rows before OnTokens (not if WantsExpertOutputs),
  // and layers without a router are shown too, with residual, input and output alone.
  virtual bool WantsExpertRows() const { return false; }
  virtual void OnExpertRows(const ExpertRows&) {}
  virtual void OnTokens(const MoeTokens& tokens) = 0;
};

}  // namespace winnow
