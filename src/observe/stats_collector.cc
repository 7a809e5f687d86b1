#include "observe/stats_collector.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "kernels/accumulate.h"
#include "kernels/elementwise.h"

namespace winnow {

struct StatsCollector::SourceSums {
  std::vector<int64_t> tokens;                                  // [E]
  std::vector<double> weight;                                   // [E]
  std::vector<double> largest;                                  // [E]
  std::vector<double> selected, weighted, squared_weight, all;  // [E, hidden]
};

std::vector<double> WeightFlatness(const LayerWeights& weights, ThreadPool& pool) {
  std::vector<double> flatness(weights.experts.size());
  pool.Run(std::ssize(weights.experts), [&](int64_t e, int) {
    const FeedForwardWeights& expert = weights.experts[static_cast<size_t>(e)];
    double absolute = 0, square = 0, count = 0;
    for (const WeightMatrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
      AccumulateMoments(*matrix, &absolute, &square);
      count += static_cast<double>(matrix->rows) * static_cast<double>(matrix->cols);
    }
    flatness[static_cast<size_t>(e)] = square > 0 ? absolute / std::sqrt(count * square) : 0.0;
  });
  return flatness;
}

StatsCollector::StatsCollector(const StatsInfo& info, const StatsLayer& layer,
                               LayerStatsWriter& writer, ThreadPool& pool)
    : info_(info), writer_(writer), pool_(pool), num_experts_(layer.num_experts) {
  int64_t end = 0;
  const auto experts = static_cast<size_t>(num_experts_);
  const size_t matrix = experts * static_cast<size_t>(info.hidden_size);
  for (const StatsSource& source : info.sources) {
    end += source.num_tokens;
    source_end_.push_back(end);
    SourceSums& sums = sums_.emplace_back();
    sums.tokens.resize(experts);
    sums.weight.resize(experts);
    if (info.level != StatsLevel::kRouting) {
      sums.largest.resize(experts);
      sums.selected.resize(matrix);
      sums.weighted.resize(matrix);
      sums.squared_weight.resize(matrix);
    }
    if (info.level == StatsLevel::kFull) sums.all.resize(matrix);
  }
}

StatsCollector::~StatsCollector() = default;

void StatsCollector::SetTarget(const float* target, int64_t first_token) {
  target_ = target;
  target_first_ = first_token;
}

void StatsCollector::OnTokens(const MoeTokens& m) {
  const int64_t count = m.num_tokens * m.num_experts;
  if (!std::all_of(m.router_logits, m.router_logits + count,
                   [](float logit) { return std::isfinite(logit); })) {
    throw ModelError(fmt::format("layer {}: the router's logits are not finite", m.layer),
                     "the weights hold NaN or Inf: see winnow doctor MODEL");
  }
  Records(m);
  Sums(m);
}

void StatsCollector::Records(const MoeTokens& m) {
  const auto n = static_cast<size_t>(m.num_tokens);
  const int64_t h = m.hidden, experts = m.num_experts, k = m.num_experts_per_tok;
  const int64_t pairs = experts * (experts + 1) / 2;
  const bool full = m.expert_outputs != nullptr;
  const bool outputs = full || m.selected_outputs != nullptr;
  residual_.resize(n);
  stream_.resize(n);
  dots_.resize(outputs ? n : 0);
  routed_.resize(outputs ? n : 0);
  norms_.resize(outputs ? n * static_cast<size_t>(k) : 0);
  gram_.resize(full ? n * static_cast<size_t>(pairs) : 0);
  target_dot_.resize(target_ != nullptr ? n * static_cast<size_t>(experts) : 0);
  target_norm_.resize(target_ != nullptr ? n : 0);
  constexpr int64_t kTokens = 16;
  pool_.Run((m.num_tokens + kTokens - 1) / kTokens, [&](int64_t task, int) {
    const int64_t end = std::min(m.num_tokens, (task + 1) * kTokens);
    for (int64_t t = task * kTokens; t < end; ++t) {
      const auto at = static_cast<size_t>(t);
      const float* residual = m.residual + t * h;
      const float* output = m.output + t * h;
      residual_[at] = Dot(residual, residual, h);
      // |h + y|^2 from three dots: the sum itself is not stored anywhere yet.
      stream_[at] = residual_[at] + 2 * Dot(residual, output, h) + Dot(output, output, h);
      if (outputs) {
        const float* routed = m.routed + t * h;
        dots_[at] = Dot(residual, routed, h);
        routed_[at] = Dot(routed, routed, h);
      }
      const float* f = full ? m.expert_outputs + t * experts * h : nullptr;
      if (full) GramUpper(f, experts, h, h, gram_.data() + t * pairs);
      for (int64_t i = 0; outputs && i < k; ++i) {
        const int64_t e = m.topk_ids[t * k + i];
        const float* row = full ? f + e * h : m.selected_outputs + (t * k + i) * h;
        norms_[static_cast<size_t>(t * k + i)] = std::sqrt(Dot(row, row, h));
      }
      if (target_ == nullptr) continue;
      const float* target = target_ + (m.first_token + t - target_first_) * h;
      std::vector<float> repair;
      if (info_.progressive_target == ProgressiveTarget::kRepairDrift) {
        // h'* - h - s, s being the part of the output that is not routed.
        repair.assign(target, target + h);
        for (int64_t i = 0; i < h; ++i) {
          repair[static_cast<size_t>(i)] -= residual[i] + (output[i] - m.routed[t * h + i]);
        }
        target = repair.data();
      }
      target_norm_[at] = Dot(target, target, h);
      for (int64_t e = 0; e < experts; ++e) {
        target_dot_[static_cast<size_t>(t * experts + e)] = Dot(f + e * h, target, h);
      }
    }
  });
  writer_.WriteRecords("router_logits", m.first_token,
                       {m.router_logits, n * static_cast<size_t>(experts)});
  writer_.WriteRecords("residual_norm_squared", m.first_token, residual_);
  writer_.WriteRecords("stream_norm_squared", m.first_token, stream_);
  if (outputs) {
    writer_.WriteRecords("residual_dot_routed", m.first_token, dots_);
    writer_.WriteRecords("routed_norm_squared", m.first_token, routed_);
    writer_.WriteRecords("selected_norm", m.first_token, norms_);
  }
  if (full) writer_.WriteRecords("gram", m.first_token, gram_);
  if (target_ != nullptr) {
    writer_.WriteRecords("target_dot", m.first_token, target_dot_);
    writer_.WriteRecords("target_norm_squared", m.first_token, target_norm_);
  }
}

void StatsCollector::Sums(const MoeTokens& m) {
  const int64_t h = m.hidden, experts = m.num_experts, k = m.num_experts_per_tok;
  int64_t first = 0;
  while (first < m.num_tokens) {  // a run of tokens may hold the end of one source and the next
    const auto source = static_cast<size_t>(
        std::upper_bound(source_end_.begin(), source_end_.end(), m.first_token + first) -
        source_end_.begin());
    const int64_t end = std::min(m.num_tokens, source_end_[source] - m.first_token);
    SourceSums& sums = sums_[source];
    // One task per expert: its sums are taken by one thread in token order.
    pool_.Run(experts, [&](int64_t e, int) {
      const auto expert = static_cast<size_t>(e);
      if (m.expert_outputs != nullptr) {
        AccumulateRows(sums.all.data() + e * h, m.expert_outputs + (first * experts + e) * h,
                       end - first, experts * h, h);
      }
      for (int64_t slot = first * k; slot < end * k; ++slot) {
        if (m.topk_ids[slot] != e) continue;
        const double w = static_cast<double>(m.topk_weights[slot]);
        ++sums.tokens[expert];
        sums.weight[expert] += w;
        if (m.expert_outputs == nullptr && m.selected_outputs == nullptr) continue;
        const float* row = m.expert_outputs != nullptr
                               ? m.expert_outputs + (slot / k * experts + e) * h
                               : m.selected_outputs + slot * h;
        sums.largest[expert] =
            std::max(sums.largest[expert], static_cast<double>(LargestMagnitude(row, h)));
        AccumulateWeighted(sums.selected.data() + e * h, sums.weighted.data() + e * h,
                           sums.squared_weight.data() + e * h, w, row, h);
      }
    });
    first = end;
  }
}

void StatsCollector::Finish() {
  for (size_t s = 0; s < sums_.size(); ++s) {
    const SourceSums& sums = sums_[s];
    const std::string prefix = fmt::format("sums.{}.", s);
    writer_.WriteWhole(prefix + "tokens", std::as_bytes(std::span(sums.tokens)));
    writer_.WriteWhole(prefix + "weight", std::as_bytes(std::span(sums.weight)));
    if (!sums.selected.empty()) {
      writer_.WriteWhole(prefix + "largest_output", std::as_bytes(std::span(sums.largest)));
      writer_.WriteWhole(prefix + "selected_output", std::as_bytes(std::span(sums.selected)));
      writer_.WriteWhole(prefix + "weighted_output", std::as_bytes(std::span(sums.weighted)));
      writer_.WriteWhole(prefix + "squared_weight_output",
                         std::as_bytes(std::span(sums.squared_weight)));
    }
    if (!sums.all.empty())
      writer_.WriteWhole(prefix + "output", std::as_bytes(std::span(sums.all)));
  }
  writer_.Finish();
}

uint64_t StatsCollector::Bytes(const StatsInfo& info, int64_t max_experts, int64_t chunk_tokens) {
  const auto experts = static_cast<uint64_t>(max_experts);
  const auto chunk = static_cast<uint64_t>(chunk_tokens);
  uint64_t floats = chunk * (5 + static_cast<uint64_t>(info.num_experts_per_tok));
  if (info.level == StatsLevel::kFull) floats += chunk * experts * (experts + 1) / 2;
  if (info.progressive_keep) floats += chunk * (experts + 1);
  uint64_t doubles = experts * 3;
  if (info.level == StatsLevel::kRouted)
    doubles += experts * static_cast<uint64_t>(info.hidden_size) * 3;
  if (info.level == StatsLevel::kFull)
    doubles += experts * static_cast<uint64_t>(info.hidden_size) * 4;
  return floats * sizeof(float) + doubles * sizeof(double) * info.sources.size();
}

}  // namespace winnow
