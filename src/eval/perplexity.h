// Perplexity under named protocols. Every number carries its protocol's name; numbers of different
// protocols are not comparable. Layer-major: all windows go through a layer together, lm_head is
// read once.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "eval/eval_sweep.h"      // EvalOptions, EvalPlan
#include "text/text_source.h"     // TextSource
#include "tokenizer/tokenizer.h"  // Tokenizer

namespace winnow {

// How text becomes windows and which positions are scored.
struct PerplexityProtocol {
  std::string name;
  int64_t window = 512;
  bool bos = true;              // each window starts with BOS, which replaces its last token
  bool half = false;            // only the second half of each window is scored
  bool join_documents = false;  // tokenise the whole text at once, documents joined by two newlines
  std::string description = {};
};
// bos-512 (default), plain-512, gptq-wikitext2-2048, llamacpp-512. UsageError for other names.
PerplexityProtocol FindProtocol(const std::string& name);
std::vector<PerplexityProtocol> AllProtocols();

// Windows to feed and what to score in them.
struct ScoredWindows {
  TokenSet inputs;
  // For every input token the id it must predict, or -1 if the position is not scored.
  std::vector<int32_t> targets;
  int64_t scored = 0;
  uint64_t bytes = 0;  // of the text the scored tokens stand for; 0 if unknown
};

// Special ids a protocol needs; from config.json and the tokenizer.
struct ModelTokens {
  std::optional<int32_t> bos;
  std::optional<int32_t> eos;
};

// `max_tokens` 0 = all whole windows of the text. UsageError if the text has no whole window.
ScoredWindows WindowsOfText(const TextSource& source, const std::string& field,
                            const Tokenizer& tokenizer, const ModelTokens& ids,
                            const PerplexityProtocol& protocol, int64_t max_tokens);
// Rows are windows, nothing is added, positions 1.. are scored.
ScoredWindows WindowsOfIds(const TokenSequences& rows);

struct PerplexityResult {
  double nll = 0;  // mean over scored tokens, natural log
  double perplexity = 0;
  std::optional<double> standard_error;  // of nll, over windows; nothing for a single window
  int64_t tokens = 0;
  std::optional<double> bits_per_byte;
  std::optional<SkipCounts> skipping;  // of all positions, if experts were skipped
  std::vector<double> window_nll;      // sum per window
  std::vector<int64_t> window_tokens;
};

EvalPlan PlanPerplexity(const Model& model, const ScoredWindows& windows,
                        const EvalOptions& options, int num_threads);
PerplexityResult RunPerplexity(const Model& model, const ScoredWindows& windows,
                               const EvalOptions& options, const EvalPlan& plan, ThreadPool& pool,
                               const JobControl& control);

// The last step alone: scores of streams that went through all layers.
PerplexityResult ScoreStates(const Model& model, const ScoredWindows& windows, HiddenStates& states,
                             ThreadPool& pool, const JobControl& control);

// Mean, perplexity and standard error from per-window sums; `bytes` 0 = unknown.
PerplexityResult Summarize(std::span<const double> window_nll,
                           std::span<const int64_t> window_tokens, uint64_t bytes);

// Difference of two results on the same windows: mean of (b - a) per token and its paired standard
// error.
struct PairedDifference {
  double nll = 0;
  std::optional<double> standard_error;  // nothing for a single window
};
PairedDifference Compare(const PerplexityResult& a, const PerplexityResult& b);

}  // namespace winnow
