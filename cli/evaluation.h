// Perplexity of one or two models on the same tokens, shared by eval and compress.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "eval/perplexity.h"  // ScoredWindows, PerplexityResult
#include "session.h"          // Session

namespace winnow::cli {

struct EvalText {
  std::string name;
  ScoredWindows windows;
};

struct EvalRow {
  std::string name;
  PerplexityResult result;
  std::optional<PerplexityResult> original;  // with --against
};

// Texts cut by a protocol, once, with the tokenizer of `model_folder`.
std::vector<EvalText> LoadEvalTexts(const Model& model, const std::string& model_folder,
                                    const std::vector<std::string>& paths, const std::string& field,
                                    const PerplexityProtocol& protocol, int64_t max_tokens);
// How a model is run.
struct EvalRun {
  std::vector<std::vector<int32_t>> kept_experts = {};
  SkipBetas skip_betas = {};
};
// Results of all texts, in order; what was skipped over all of them, if anything could be.
struct EvalResults {
  std::vector<PerplexityResult> texts;
  std::optional<SkipCounts> skipping;
};
EvalResults Evaluate(Session& session, const Model& model, const std::vector<EvalText>& texts,
                     const EvalRun& run, const std::string& spill_folder);
// "0.0042", or "-" where a single window leaves it unknown.
std::string FormatStandardError(const std::optional<double>& value);
std::string EvalTable(const std::vector<EvalRow>& rows, const std::string& protocol);
OrderedJson EvalJson(const std::vector<EvalRow>& rows, const std::string& protocol);

// `eval tasks`, in cmd_eval_tasks.cc.
void AddEvalTasks(CLI::App& eval, Session& session);

}  // namespace winnow::cli
