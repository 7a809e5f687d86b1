#include "methods/naee_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <utility>

#include "methods/router_ranking.h"

namespace winnow {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Tokens a task sums. Fixed, so that sums have one order for any number of threads.
constexpr int64_t kTaskTokens = 256;
// Share of the loss below which an exchange's gain is rounding.
constexpr double kLeastGain = 1e-12;

// A set of experts a token uses, with m their softmax mass under the intact router and y = sum m_e
// f_e: once their weights share a factor s, |z - s y|^2 = s^2 |y|^2 - 2 s y.z + |z|^2.
struct Form {
  double quadratic = 0;  // |y|^2
  double linear = 0;     // y . z
  double mass = 0;       // sum of m_e
};

// One token's records, and the three ways a form changes.
struct TokenView {
  int64_t experts;
  const float* gram;      // [E(E+1)/2]
  const double* mass;     // [E] softmax of the intact router
  const double* linear;   // [E] f_e . z
  const uint16_t* order;  // [E] experts by falling logit

  double Gram(int32_t a, int32_t b) const {
    const int64_t i = std::min(a, b), j = std::max(a, b);
    return static_cast<double>(gram[i * experts - i * (i - 1) / 2 + (j - i)]);
  }
  // f_e . y of a set
  template <class Set>
  double Dot(int32_t e, const Set& set) const {
    double sum = 0;
    for (const int32_t j : set) sum += mass[j] * Gram(e, j);
    return sum;
  }
  template <class Set>
  Form Of(const Set& set) const {
    Form form;
    for (const int32_t e : set) {
      form.quadratic += mass[e] * Dot(e, set);
      form.linear += mass[e] * linear[e];
      form.mass += mass[e];
    }
    return form;
  }
  // e is in the form's set and leaves; dot = f_e . y before.
  Form Without(const Form& form, int32_t e, double dot) const {
    return {form.quadratic - 2 * mass[e] * dot + mass[e] * mass[e] * Gram(e, e),
            form.linear - mass[e] * linear[e], form.mass - mass[e]};
  }
  // e is not in the form's set and comes; dot = f_e . y before.
  Form With(const Form& form, int32_t e, double dot) const {
    return {form.quadratic + 2 * mass[e] * dot + mass[e] * mass[e] * Gram(e, e),
            form.linear + mass[e] * linear[e], form.mass + mass[e]};
  }
};

class Searcher {
 public:
  Searcher(const LayerStatsReader& records, const StatsInfo& info, const StatsLayer& layer,
           const NaeeSearchOptions& options, ThreadPool& pool, const JobControl& control)
      : reader_(records),
        objective_(options.objective),
        pool_(pool),
        control_(control),
        batches_(info.Batches()),
        experts_(layer.num_experts),
        k_(info.num_experts_per_tok),
        normalize_(info.norm_topk_prob),
        epsilon_(info.normalize_epsilon),
        alive_(static_cast<size_t>(experts_), 1),
        guarded_(static_cast<size_t>(experts_), 0) {
    for (const int32_t e : options.guarded) guarded_[static_cast<size_t>(e)] = 1;
    const int64_t tokens = info.num_tokens();
    const uint64_t record_bytes =
        static_cast<uint64_t>(tokens) *
        static_cast<uint64_t>(experts_ * (experts_ + 1) / 2 + 2 * experts_) * sizeof(float);
    if (record_bytes <= options.memory_bytes) held_.resize(batches_.size());
    const auto n = static_cast<size_t>(tokens), e = static_cast<size_t>(experts_),
               k = static_cast<size_t>(k_);
    order_.resize(n * e);
    mass_.resize(n * e);
    linear_.resize(n * e);
    target_norm_.resize(n);
    factor_.resize(n);
    left_.resize(n);
    selected_.resize(n * k);
    next_.resize(n);
    form_.resize(n);
    without_.resize(n * k);
    ForBatches([&](int64_t first, const TokenRecords& batch) {
      RunTasks(batch.num_tokens, [&](int64_t t, size_t) { PrepareToken(batch, t, first + t); });
      double squared = 0;
      for (int64_t t = first; t < first + batch.num_tokens; ++t) {
        squared += factor_[static_cast<size_t>(t)] * target_norm_[static_cast<size_t>(t)];
      }
      for (int64_t t = 0; t < batch.num_tokens; ++t) {
        weight_ += mix_ * batch.Weight(static_cast<size_t>(t));
      }
      whole_ += mix_ * BatchLoss(objective_, squared);
    });
  }

  // Drops one expert after the other, down to `keep` survivors.
  void Eliminate(int64_t keep) {
    for (int64_t survivors = std::ssize(Survivors(true)); survivors > keep; --survivors) {
      const std::vector<double> loss = RemovalLosses();
      int32_t best = -1;  // ties go to the lowest id, the lexicographically first set
      for (int32_t e = 0; e < experts_; ++e) {
        if (!IsAlive(e) || IsGuarded(e)) continue;
        if (best < 0 || loss[static_cast<size_t>(e)] < loss[static_cast<size_t>(best)]) best = e;
      }
      if (best < 0) return;  // all that are left are guarded
      loss_ = loss[static_cast<size_t>(best)];
      alive_[static_cast<size_t>(best)] = 0;
      ForBatches([&](int64_t first, const TokenRecords& batch) {
        RunTasks(batch.num_tokens, [&](int64_t t, size_t) {
          const int64_t token = first + t;
          left_[static_cast<size_t>(token)] -= mass_[At(token, best)];
          const std::span<const uint16_t> used = Selected(token);
          if (next_[static_cast<size_t>(token)] == best ||
              std::find(used.begin(), used.end(), best) != used.end()) {
            Refresh(View(batch, t, token), token);
          }
        });
      });
    }
  }

  // Makes the best exchange of all, again and again.
  void Swap() {
    for (;;) {
      const Exchange best = BestExchange();
      next_loss_ = best.loss;
      if (!(best.loss < loss_ * (1 - kLeastGain))) return;
      loss_ = best.loss;
      alive_[static_cast<size_t>(best.out)] = 0;
      alive_[static_cast<size_t>(best.in)] = 1;
      ForBatches([&](int64_t first, const TokenRecords& batch) {
        RunTasks(batch.num_tokens, [&](int64_t t, size_t) {
          const int64_t token = first + t;
          left_[static_cast<size_t>(token)] +=
              mass_[At(token, best.in)] - mass_[At(token, best.out)];
          Refresh(View(batch, t, token), token);
        });
      });
    }
  }

  // The loss without each survivor [E].
  std::vector<double> RemovalLosses() {
    const auto experts = static_cast<size_t>(experts_);
    std::vector<double> loss(experts);
    const std::vector<int32_t> survivors = Survivors(true);
    ForBatches([&](int64_t first, const TokenRecords& batch) {
      std::vector<double> sums(static_cast<size_t>(NumTasks(batch.num_tokens)) * experts);
      RunTasks(batch.num_tokens, [&](int64_t t, size_t task) {
        AddRemovalErrors(first + t, survivors, &sums[task * experts]);
      });
      for (const int32_t e : survivors) {
        double squared = 0;
        for (size_t i = static_cast<size_t>(e); i < sums.size(); i += experts) squared += sums[i];
        loss[static_cast<size_t>(e)] += mix_ * BatchLoss(objective_, squared);
      }
    });
    return loss;
  }

  NaeeSet Result() const { return {Survivors(true), loss_, next_loss_, whole_, weight_}; }

 private:
  struct Exchange {
    int32_t out = -1, in = -1;
    double loss = kInfinity;
  };

  size_t At(int64_t token, int64_t column) const {
    return static_cast<size_t>(token * experts_ + column);
  }
  bool IsAlive(int32_t e) const { return alive_[static_cast<size_t>(e)] != 0; }
  bool IsGuarded(int32_t e) const { return guarded_[static_cast<size_t>(e)] != 0; }
  std::vector<int32_t> Survivors(bool alive) const {
    std::vector<int32_t> found;
    for (int32_t e = 0; e < experts_; ++e) {
      if (IsAlive(e) == alive) found.push_back(e);
    }
    return found;
  }
  // The token's k experts among the survivors, best first.
  std::span<const uint16_t> Selected(int64_t token) const {
    return std::span(selected_).subspan(static_cast<size_t>(token * k_), static_cast<size_t>(k_));
  }
  TokenView View(const TokenRecords& batch, int64_t t, int64_t token) const {
    return {experts_, batch.gram.data() + t * (experts_ * (experts_ + 1) / 2), &mass_[At(token, 0)],
            &linear_[At(token, 0)], &order_[At(token, 0)]};
  }

  // body(first token, records) for each batch in order.
  template <class Body>
  void ForBatches(const Body& body) {
    for (size_t b = 0; b < batches_.size(); ++b) {
      control_.Poll();
      const StatsBatch& batch = batches_[b];
      TokenRecords& records = held_.empty() ? scratch_ : held_[b];
      if (held_.empty() || records.num_tokens == 0) {
        reader_.ReadTokens(batch.first_token, batch.num_tokens, records);
      }
      mix_ = batch.mix;
      body(batch.first_token, std::as_const(records));
    }
  }

  // body(token of the batch, task) in parallel.
  template <class Body>
  void RunTasks(int64_t num_tokens, const Body& body) {
    pool_.Run(NumTasks(num_tokens), [&](int64_t task, int) {
      const int64_t end = std::min(num_tokens, (task + 1) * kTaskTokens);
      for (int64_t t = task * kTaskTokens; t < end; ++t) body(t, static_cast<size_t>(task));
    });
  }
  static int64_t NumTasks(int64_t num_tokens) {
    return (num_tokens + kTaskTokens - 1) / kTaskTokens;
  }

  void PrepareToken(const TokenRecords& batch, int64_t t, int64_t token) {
    const auto experts = static_cast<size_t>(experts_);
    const std::span logits =
        std::span(batch.router_logits).subspan(static_cast<size_t>(t) * experts, experts);
    const std::span order = std::span(order_).subspan(At(token, 0), experts);
    const std::span mass = std::span(mass_).subspan(At(token, 0), experts);
    double* linear = &linear_[At(token, 0)];
    RankExperts(logits, experts_, order);
    SoftmaxOfLogits(logits, order[0], mass);
    const TokenView view = View(batch, t, token);
    const auto at = static_cast<size_t>(token);
    if (reader_.has_target()) {
      target_norm_[at] = static_cast<double>(batch.target_norm_squared[static_cast<size_t>(t)]);
      for (int64_t e = 0; e < experts_; ++e) {
        linear[e] = static_cast<double>(batch.target_dot[static_cast<size_t>(t * experts_ + e)]);
      }
    } else {  // z is what the intact router gives
      const std::span<const uint16_t> used = order.first(static_cast<size_t>(k_));
      double used_mass = 0;
      for (const uint16_t e : used) used_mass += mass[e];
      const double scale = normalize_ ? 1 / (used_mass + epsilon_) : 1.0;
      for (int32_t e = 0; e < experts_; ++e) linear[e] = scale * view.Dot(e, used);
      for (const uint16_t e : used) target_norm_[at] += scale * mass[e] * linear[e];
    }
    left_[at] = 1.0;
    factor_[at] =
        batch.Weight(static_cast<size_t>(t)) *
        TokenFactor(objective_, target_norm_[at],
                    static_cast<double>(batch.stream_norm_squared[static_cast<size_t>(t)]));
    Refresh(view, token);
  }

  // The token's experts among the survivors, and its forms.
  void Refresh(const TokenView& view, int64_t token) {
    uint16_t* selected = &selected_[static_cast<size_t>(token * k_)];
    int32_t next = -1;
    for (int64_t rank = 0, found = 0; rank < experts_; ++rank) {
      const uint16_t e = view.order[rank];
      if (!IsAlive(e)) continue;
      if (found == k_) {
        next = e;
        break;
      }
      selected[found++] = e;
    }
    const auto at = static_cast<size_t>(token);
    const std::span<const uint16_t> used = Selected(token);
    next_[at] = next;
    form_[at] = view.Of(used);
    if (next < 0) return;
    const double next_dot = view.Dot(next, used);
    for (size_t i = 0; i < used.size(); ++i) {
      const int32_t e = used[i];
      const Form rest = view.Without(form_[at], e, view.Dot(e, used));
      without_[static_cast<size_t>(token * k_) + i] =
          view.With(rest, next, next_dot - view.mass[e] * view.Gram(next, e));
    }
  }

  // What token `at` adds to the loss with this form. `left`: the softmax mass of all survivors.
  double Error(size_t at, const Form& form, double left) const {
    const double scale = 1 / (normalize_ ? form.mass + epsilon_ : left);
    return factor_[at] * std::max(0.0, scale * scale * form.quadratic - 2 * scale * form.linear +
                                           target_norm_[at]);
  }

  void AddRemovalErrors(int64_t token, const std::vector<int32_t>& survivors, double* sums) const {
    const auto at = static_cast<size_t>(token);
    const double unchanged = normalize_ ? Error(at, form_[at], 1) : 0;
    for (const int32_t e : survivors) {
      sums[e] += normalize_ ? unchanged : Error(at, form_[at], left_[at] - mass_[At(token, e)]);
    }
    const std::span<const uint16_t> used = Selected(token);
    for (size_t i = 0; i < used.size(); ++i) {
      const double left = left_[at] - mass_[At(token, used[i])];
      sums[used[i]] += Error(at, without_[static_cast<size_t>(token * k_) + i], left) -
                       (normalize_ ? unchanged : Error(at, form_[at], left));
    }
  }

  // Of all pairs of a survivor and a dropped expert.
  Exchange BestExchange() {
    std::vector<int32_t> outs = Survivors(true);
    outs.erase(std::remove_if(outs.begin(), outs.end(), [&](int32_t e) { return IsGuarded(e); }),
               outs.end());
    const std::vector<int32_t> ins = Survivors(false);
    const size_t pairs = outs.size() * ins.size();
    std::vector<double> loss(pairs);
    ForBatches([&](int64_t first, const TokenRecords& batch) {
      std::vector<double> sums(static_cast<size_t>(NumTasks(batch.num_tokens)) * pairs);
      RunTasks(batch.num_tokens, [&](int64_t t, size_t task) {
        AddExchangeErrors(View(batch, t, first + t), first + t, outs, ins, &sums[task * pairs]);
      });
      for (size_t pair = 0; pair < pairs; ++pair) {
        double squared = 0;
        for (size_t i = pair; i < sums.size(); i += pairs) squared += sums[i];
        loss[pair] += mix_ * BatchLoss(objective_, squared);
      }
    });
    Exchange best;
    for (size_t pair = 0; pair < pairs; ++pair) {
      if (loss[pair] < best.loss)
        best = {outs[pair / ins.size()], ins[pair % ins.size()], loss[pair]};
    }
    return best;
  }

  // sums [outs, ins] += the token's error after each exchange.
  void AddExchangeErrors(const TokenView& view, int64_t token, const std::vector<int32_t>& outs,
                         const std::vector<int32_t>& ins, double* sums) const {
    const auto at = static_cast<size_t>(token);
    const std::span<const uint16_t> used = Selected(token);
    // Dropped experts that would be used if they came back: 1 even if no used one leaves, 2 only if
    // one does.
    std::vector<uint8_t> enters(static_cast<size_t>(experts_));
    for (int64_t rank = 0, found = 0; rank < experts_ && view.order[rank] != next_[at]; ++rank) {
      const uint16_t e = view.order[rank];
      found += IsAlive(e) ? 1 : 0;
      enters[e] = found < k_ ? 1 : 2;
    }
    // Without a used expert: the rest of the set.
    std::vector<Form> rest(used.size());
    for (size_t i = 0; i < used.size(); ++i) {
      rest[i] = view.Without(form_[at], used[i], view.Dot(used[i], used));
    }
    std::vector<Form> entered(ins.size());  // if no used expert leaves
    std::vector<double> dot(ins.size());
    for (size_t j = 0; j < ins.size(); ++j) {
      const int32_t in = ins[j];
      entered[j] = form_[at];
      if (enters[static_cast<size_t>(in)] == 0) continue;
      dot[j] = view.Dot(in, used);
      if (enters[static_cast<size_t>(in)] == 1) {
        const int32_t last = used.back();
        entered[j] = view.With(rest.back(), in, dot[j] - view.mass[last] * view.Gram(in, last));
      }
    }
    std::vector<double> shared(ins.size());  // with renormalisation the same for all unused experts
    if (normalize_) {
      for (size_t j = 0; j < ins.size(); ++j) shared[j] = Error(at, entered[j], 1);
    }
    for (size_t i = 0; i < outs.size(); ++i, sums += ins.size()) {
      const int32_t out = outs[i];
      const auto place = std::find(used.begin(), used.end(), out);
      if (place == used.end() && normalize_) {
        for (size_t j = 0; j < ins.size(); ++j) sums[j] += shared[j];
        continue;
      }
      const double left = left_[at] - view.mass[out];
      const auto slot = static_cast<size_t>(place - used.begin());
      for (size_t j = 0; j < ins.size(); ++j) {
        const int32_t in = ins[j];
        Form form = entered[j];
        if (place != used.end()) {
          form = enters[static_cast<size_t>(in)] == 0
                     ? without_[static_cast<size_t>(token * k_) + slot]
                     : view.With(rest[slot], in, dot[j] - view.mass[out] * view.Gram(in, out));
        }
        sums[j] += Error(at, form, left + view.mass[in]);
      }
    }
  }

  const LayerStatsReader& reader_;
  NaeeObjective objective_;
  ThreadPool& pool_;
  const JobControl& control_;
  std::vector<StatsBatch> batches_;
  int64_t experts_, k_;
  bool normalize_;
  double epsilon_;
  double mix_ = 1;                  // of the batch at hand
  std::vector<uint8_t> alive_;      // [E]
  std::vector<uint8_t> guarded_;    // [E]
  std::vector<TokenRecords> held_;  // one a batch; empty if they do not fit
  TokenRecords scratch_;
  // Of each token:
  std::vector<uint16_t> order_;                      // [T, E]
  std::vector<double> mass_, linear_;                // [T, E]
  std::vector<double> target_norm_, left_, factor_;  // [T]
  std::vector<uint16_t> selected_;                   // [T, k]
  std::vector<int32_t> next_;                        // the survivor after them, -1: none
  std::vector<Form> form_;                           // of the selected
  std::vector<Form> without_;                        // [T, k]: one of them gone, the next used
  double loss_ = 0, next_loss_ = kInfinity, whole_ = 0, weight_ = 0;
};

}  // namespace

std::vector<NaeeSet> NaeeCurve(const LayerStatsReader& records, const StatsInfo& info,
                               const StatsLayer& layer, const NaeeSearchOptions& options,
                               int64_t least, ThreadPool& pool, const JobControl& control) {
  Searcher searcher(records, info, layer, options, pool, control);
  std::vector<NaeeSet> curve;
  for (int64_t keep = layer.num_experts - 1; keep >= least; --keep) {
    searcher.Eliminate(keep);
    if (layer.num_experts <= kMostPolished) searcher.Swap();
    NaeeSet set = searcher.Result();
    if (std::ssize(set.kept) != keep) break;  // the rest is guarded
    curve.push_back(std::move(set));
  }
  return curve;
}

NaeeSet SearchNaee(const LayerStatsReader& records, const StatsInfo& info, const StatsLayer& layer,
                   const NaeeSearchOptions& options, int64_t keep, ThreadPool& pool,
                   const JobControl& control) {
  Searcher searcher(records, info, layer, options, pool, control);
  searcher.Eliminate(keep);
  searcher.Swap();
  return searcher.Result();
}

std::vector<double> RemovalLosses(const LayerStatsReader& records, const StatsInfo& info,
                                  const StatsLayer& layer, uint64_t memory_bytes, ThreadPool& pool,
                                  const JobControl& control) {
  return Searcher(records, info, layer, {.memory_bytes = memory_bytes}, pool, control)
      .RemovalLosses();
}

uint64_t NaeeSearchBytes(const StatsInfo& info, const StatsLayer& layer) {
  const auto k = static_cast<uint64_t>(info.num_experts_per_tok);
  const auto experts = static_cast<uint64_t>(layer.num_experts);
  const uint64_t per_token = experts * (2 + 8 + 8) + 3 * 8 + k * 2 + 4 + sizeof(Form) * (1 + k);
  return per_token * static_cast<uint64_t>(info.num_tokens());
}

}  // namespace winnow
