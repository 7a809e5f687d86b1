// What the two ways of `winnow compress` share: its flags, the names in OUT.work, and perplexity
// before and after. cmd_compress.cc drops experts and skips; sizing.h fits a size by all means.
#pragma once

#include <string>
#include <vector>

#include "calibration.h"          // CalibrationFlags
#include "evaluation.h"           // EvalText, EvalRow
#include "observe/observe_run.h"  // ObserveOptions
#include "session.h"              // Session

namespace winnow::cli {

// In OUT.work: OUT is an older checkpoint that this run replaces.
inline constexpr const char* kReplacesName = "replaces";
// In OUT.work: a checkpoint that is measured before it becomes OUT.
inline constexpr const char* kCandidateName = "candidate";

struct CompressFlags {
  std::string model, output, protocol = "bos-512", budget = "uniform", size, max_increase;
  std::string target;               // empty: winnow with all means, else transformers
  std::string means, bits_of_rest;  // empty: not given
  CalibrationFlags calibration;
  std::vector<std::string> texts;
  ObserveOptions observe;
  int64_t keep = 0, max_tokens = 8192;
  double active = 0;
  bool progressive = false, keep_stats = false, no_heal = false;

  // What decides how much goes.
  bool searches() const { return keep == 0 && active == 0; }
  bool prunes() const { return keep > 0 || searches(); }
};

// "5%" -> 0.05, of --max-ppl-increase. UsageError for anything else.
double ParseIncrease(const std::string& text);

// What an interrupted, a refused or a --keep-stats run leaves in OUT.work: nothing but these.
bool IsOfWork(const std::string& name);

// Perplexity on the texts of --text, of the model and of what it became.
struct TextMeasurements {
  std::vector<EvalRow> rows;  // empty: nothing was measured
  std::string skipping;       // what the smaller model skips, if anything
  std::string card;           // a table for the model card
};
TextMeasurements MeasureTexts(Session& session, const Model& model, const Model& smaller,
                              const std::vector<EvalText>& texts,
                              const PerplexityProtocol& protocol, const std::string& spill_folder);
// The table, or how it is made where there were no texts.
void PrintMeasurements(Session& session, const TextMeasurements& measured,
                       const CompressFlags& flags);

}  // namespace winnow::cli
