#include "compressing.h"

#include <fmt/format.h>

#include "base/error.h"
#include "base/units.h"
#include "pruning.h"

namespace winnow::cli {

double ParseIncrease(const std::string& text) {
  size_t used = 0;
  double percent = -1;
  try {
    percent = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || text.substr(used) != "%" || !(percent >= 0) || percent > 1e6) {
    throw UsageError(fmt::format("--max-ppl-increase: \"{}\" is not a percentage", text),
                     "e.g. --max-ppl-increase 5%");
  }
  return percent / 100;
}

bool IsOfWork(const std::string& name) {
  for (const char* known : {"stats", "neurons", kCandidateName}) {
    if (name == known || name == std::string(known) + ".partial") return true;
  }
  for (const char* prefix : {"stats-of-", "healed-", "unpacked-", "candidate-"}) {
    if (IsNumbered(name, prefix)) return true;
  }
  return name == kReplacesName || name.ends_with(".spill");
}

TextMeasurements MeasureTexts(Session& session, const Model& model, const Model& smaller,
                              const std::vector<EvalText>& texts,
                              const PerplexityProtocol& protocol, const std::string& spill_folder) {
  TextMeasurements measured;
  const auto evaluate = [&](const Model& which) {
    return Evaluate(session, which, texts, {.skip_betas = SkippingOf(which, "", false)},
                    spill_folder);
  };
  const EvalResults before = evaluate(model), after = evaluate(smaller);
  if (after.skipping) measured.skipping = DescribeSkipping(smaller, *after.skipping);
  measured.card = fmt::format(
      "Protocol `{}`: {}.\n\n| text | tokens | original | smaller | d nll +- s.e. |\n"
      "|---|--:|--:|--:|--:|\n",
      protocol.name, protocol.description);
  for (size_t i = 0; i < texts.size(); ++i) {
    const EvalRow row{texts[i].name, after.texts[i], before.texts[i]};
    const PairedDifference d = Compare(*row.original, row.result);
    measured.card +=
        fmt::format("| {} | {} | {:.3f} | {:.3f} | {:+.4f} +- {} |\n", row.name,
                    FormatCount(static_cast<uint64_t>(row.result.tokens)), row.original->perplexity,
                    row.result.perplexity, d.nll, FormatStandardError(d.standard_error));
    measured.rows.push_back(row);
  }
  return measured;
}

void PrintMeasurements(Session& session, const TextMeasurements& measured,
                       const CompressFlags& flags) {
  if (measured.rows.empty()) {
    session.Note(fmt::format(
        "nothing was measured: winnow eval ppl {} --text FILE --against {} compares the two",
        flags.output, flags.model));
    return;
  }
  session.Print(EvalTable(measured.rows, flags.protocol));
  if (!measured.skipping.empty()) session.Print(measured.skipping);
}

}  // namespace winnow::cli
