#include "evaluation.h"

#include <fmt/format.h>

#include <cmath>

#include "base/error.h"
#include "base/units.h"

namespace winnow::cli {

std::vector<EvalText> LoadEvalTexts(const Model& model, const std::string& model_folder,
                                    const std::vector<std::string>& paths, const std::string& field,
                                    const PerplexityProtocol& protocol, int64_t max_tokens) {
  const EndOnInterrupt reading;
  const Tokenizer tokenizer = Tokenizer::Load(model_folder);
  ModelTokens ids{tokenizer.bos_id(), tokenizer.eos_id()};
  if (!ids.bos) ids.bos = model.config().bos_token_id;
  if (!ids.eos && !model.config().eos_token_ids.empty())
    ids.eos = model.config().eos_token_ids.front();
  std::vector<EvalText> texts;
  for (const std::string& path : paths) {
    const TextSource source = ParseTextSource(path);
    if (source.is_token_ids) {
      texts.push_back({source.name, WindowsOfIds(ReadTokenIds(source.path))});
    } else {
      texts.push_back(
          {source.name, WindowsOfText(source, field, tokenizer, ids, protocol, max_tokens)});
    }
  }
  return texts;
}

EvalResults Evaluate(Session& session, const Model& model, const std::vector<EvalText>& texts,
                     const EvalRun& run, const std::string& spill_folder) {
  // All texts go through a layer together, so that each weight is read once.
  ScoredWindows joined;
  for (const EvalText& text : texts) {
    const TokenSet& inputs = text.windows.inputs;
    for (int64_t i = 0; i < inputs.num_sequences(); ++i) {
      joined.inputs.Append(std::span(inputs.ids)
                               .subspan(static_cast<size_t>(inputs.offsets[static_cast<size_t>(i)]),
                                        static_cast<size_t>(inputs.length(i))));
    }
    joined.targets.insert(joined.targets.end(), text.windows.targets.begin(),
                          text.windows.targets.end());
    joined.scored += text.windows.scored;
  }
  EvalOptions options;
  options.memory_budget_bytes = session.memory_budget();
  options.spill_folder = spill_folder;
  options.kept_experts = run.kept_experts;
  options.skip_betas = run.skip_betas;
  options.compute = session.compute();
  const EvalPlan plan = PlanPerplexity(model, joined, options, session.pool().num_threads());
  session.RequireMemory(plan.memory, "eval");
  if (session.flags.dry_run) return {};
  const PerplexityResult all =
      RunPerplexity(model, joined, options, plan, session.pool(), session.control());
  EvalResults results{{}, all.skipping};
  size_t window = 0;
  for (const EvalText& text : texts) {
    const auto count = static_cast<size_t>(text.windows.inputs.num_sequences());
    results.texts.push_back(Summarize(std::span(all.window_nll).subspan(window, count),
                                      std::span(all.window_tokens).subspan(window, count),
                                      text.windows.bytes));
    window += count;
  }
  return results;
}

std::string FormatStandardError(const std::optional<double>& value) {
  return value ? fmt::format("{:.4f}", *value) : "-";
}

namespace {

OrderedJson OptionalNumber(const std::optional<double>& value) {
  return value ? OrderedJson(*value) : OrderedJson();
}

// Over texts, each counting alike: nll, and the paired difference with its standard error.
struct MeanOverTexts {
  double nll = 0, original_nll = 0, difference = 0;
  std::optional<double> standard_error, difference_error;
};

MeanOverTexts Mean(const std::vector<EvalRow>& rows) {
  MeanOverTexts mean;
  const auto n = static_cast<double>(rows.size());
  double variance = 0, difference_variance = 0;
  bool known = true, difference_known = true;
  for (const EvalRow& row : rows) {
    mean.nll += row.result.nll / n;
    known = known && row.result.standard_error.has_value();
    variance += std::pow(row.result.standard_error.value_or(0) / n, 2);
    if (!row.original) continue;
    const PairedDifference d = Compare(*row.original, row.result);
    mean.original_nll += row.original->nll / n;
    mean.difference += d.nll / n;
    difference_known = difference_known && d.standard_error.has_value();
    difference_variance += std::pow(d.standard_error.value_or(0) / n, 2);
  }
  if (known) mean.standard_error = std::sqrt(variance);
  if (difference_known) mean.difference_error = std::sqrt(difference_variance);
  return mean;
}

}  // namespace

std::string EvalTable(const std::vector<EvalRow>& rows, const std::string& protocol) {
  const bool paired = !rows.empty() && rows.front().original.has_value();
  std::string text = fmt::format("perplexity, protocol {}\n", protocol);
  text += fmt::format("  {:<16} {:>9} {:>10} {:>10} {:>9}{}\n", "text", "tokens", "perplexity",
                      "+- (nll)", "bits/byte", paired ? "   original   d nll +- s.e." : "");
  for (const EvalRow& row : rows) {
    text += fmt::format(
        "  {:<16} {:>9} {:>10.4f} {:>10} {:>9}", row.name,
        FormatCount(static_cast<uint64_t>(row.result.tokens)), row.result.perplexity,
        FormatStandardError(row.result.standard_error),
        row.result.bits_per_byte ? fmt::format("{:.4f}", *row.result.bits_per_byte) : "-");
    if (row.original) {
      const PairedDifference d = Compare(*row.original, row.result);
      text += fmt::format(" {:>10.4f} {:>+8.4f} +- {}", row.original->perplexity, d.nll,
                          FormatStandardError(d.standard_error));
    }
    text += "\n";
  }
  if (rows.size() > 1) {
    const MeanOverTexts mean = Mean(rows);
    int64_t tokens = 0;
    for (const EvalRow& row : rows) tokens += row.result.tokens;
    text += fmt::format("  {:<16} {:>9} {:>10.4f} {:>10} {:>9}", "mean of texts",
                        FormatCount(static_cast<uint64_t>(tokens)), std::exp(mean.nll),
                        FormatStandardError(mean.standard_error), "");
    if (paired) {
      text += fmt::format(" {:>10.4f} {:>+8.4f} +- {}", std::exp(mean.original_nll),
                          mean.difference, FormatStandardError(mean.difference_error));
    }
    text += "\n";
  }
  return text;
}

OrderedJson EvalJson(const std::vector<EvalRow>& rows, const std::string& protocol) {
  OrderedJson texts = OrderedJson::array();
  double total = 0;
  int64_t tokens = 0;
  for (const EvalRow& row : rows) {
    OrderedJson item = {{"name", row.name},
                        {"nll", row.result.nll},
                        {"perplexity", row.result.perplexity},
                        {"standard_error", OptionalNumber(row.result.standard_error)},
                        {"tokens", row.result.tokens},
                        {"bits_per_byte", OptionalNumber(row.result.bits_per_byte)}};
    if (row.original) {
      const PairedDifference d = Compare(*row.original, row.result);
      item["original"] = {{"nll", row.original->nll}, {"perplexity", row.original->perplexity}};
      item["difference"] = {{"nll", d.nll}, {"standard_error", OptionalNumber(d.standard_error)}};
    }
    total += row.result.nll * static_cast<double>(row.result.tokens);
    tokens += row.result.tokens;
    texts.push_back(item);
  }
  const double nll = total / static_cast<double>(tokens);
  const MeanOverTexts of_texts = Mean(rows);
  OrderedJson mean = {{"nll", of_texts.nll},
                      {"standard_error", OptionalNumber(of_texts.standard_error)}};
  if (!rows.empty() && rows.front().original) {
    mean["difference"] = {{"nll", of_texts.difference},
                          {"standard_error", OptionalNumber(of_texts.difference_error)}};
  }
  return {{"schema", "winnow.eval-ppl/1"},
          {"protocol", protocol},
          {"nll", nll},
          {"perplexity", std::exp(nll)},
          {"tokens", tokens},
          {"texts", texts},
          {"mean_of_texts", mean},
          {"peak_rss_bytes", PeakResidentBytes()}};
}

}  // namespace winnow::cli
