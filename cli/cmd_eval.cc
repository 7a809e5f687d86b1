// winnow eval, and eval ppl: perplexity under named protocols.
#include <fmt/format.h>

#include "base/error.h"
#include "evaluation.h"
#include "pruning.h"
#include "session.h"

namespace winnow::cli {
namespace {

struct EvalFlags {
  std::string model, against, protocol, field = "text", plan;
  std::vector<std::string> texts, ids;
  int64_t max_tokens = 0;
  bool no_skip = false;
};

int RunEvalPpl(Session& session, EvalFlags& flags) {
  if (flags.texts.empty() == flags.ids.empty()) {
    throw UsageError("give either --text FILE... or --ids FILE...");
  }
  if (!flags.ids.empty() && (!flags.protocol.empty() || flags.max_tokens > 0)) {
    throw UsageError("--ids takes neither --protocol nor --tokens",
                     "rows of the file are the windows, all positions but the first are scored");
  }
  const PerplexityProtocol protocol =
      FindProtocol(flags.protocol.empty() ? "bos-512" : flags.protocol);
  for (const std::string& path : flags.texts) {
    // Its numbers would stand under the name of a protocol that does not apply to ids.
    if (ParseTextSource(path).is_token_ids) {
      throw UsageError(fmt::format("--text {}: this file holds token ids", path), "use --ids");
    }
  }
  const Model model = Model::Open(flags.model);
  std::vector<EvalText> texts;
  for (const std::string& path : flags.ids) {
    texts.push_back({ParseTextSource(path).name, WindowsOfIds(ReadTokenIds(path))});
  }
  if (!flags.texts.empty()) {
    texts = LoadEvalTexts(model, flags.model, flags.texts, flags.field, protocol, flags.max_tokens);
  }
  const std::string name = flags.ids.empty() ? protocol.name : "ids";
  const int64_t context = model.config().max_position_embeddings;
  for (const EvalText& text : texts) {
    if (context > 0 && text.windows.inputs.longest() > context) {
      session.Warn(fmt::format("{}: windows of {} tokens exceed the model's context of {}",
                               text.name, text.windows.inputs.longest(), context));
    }
  }
  std::vector<PerplexityResult> original;
  if (!flags.against.empty()) {
    const Model reference = Model::Open(flags.against);
    if (reference.config().vocab_size != model.config().vocab_size) {
      throw UsageError("--against: the two models have different vocabularies",
                       "compare models of different tokenizers by bits per byte, one at a time");
    }
    original = Evaluate(session, reference, texts,
                        {.skip_betas = SkippingOf(reference, "", flags.no_skip)},
                        fs::temp_directory_path().string())
                   .texts;
  }
  EvalRun how{.kept_experts = WhatIf(session, model, flags.plan),
              .skip_betas = SkippingOf(model, flags.plan, flags.no_skip)};
  const std::string spill = fs::temp_directory_path().string();
  const EvalResults measured = Evaluate(session, model, texts, how, spill);
  const std::vector<PerplexityResult>& results = measured.texts;
  if (session.flags.dry_run) {
    int64_t tokens = 0;
    for (const EvalText& text : texts) tokens += text.windows.scored;
    session.PrintDryRun("eval ppl", {{"protocol", name}, {"tokens", tokens}});
    return 0;
  }
  // Skipping is shown beside the same model without it.
  std::vector<EvalRow> unskipped;
  if (measured.skipping) {
    how.skip_betas.clear();
    const EvalResults all_experts = Evaluate(session, model, texts, how, spill);
    for (size_t i = 0; i < texts.size(); ++i) {
      unskipped.push_back({texts[i].name, all_experts.texts[i], std::nullopt});
    }
  }
  std::vector<EvalRow> rows;
  for (size_t i = 0; i < texts.size(); ++i) {
    rows.push_back({texts[i].name, results[i], std::nullopt});
    if (!original.empty()) rows.back().original = original[i];
  }
  if (session.flags.json) {
    OrderedJson json = EvalJson(rows, name);
    if (measured.skipping) {
      json.update(SkippingJson(model, *measured.skipping));
      json["without_skipping"] = EvalJson(unskipped, name)["texts"];
    }
    session.PrintJson(json);
  } else {
    session.Print(EvalTable(rows, flags.ids.empty()
                                      ? protocol.name + " (" + protocol.description + ")"
                                      : "ids (rows are windows, positions 1.. scored)"));
    if (measured.skipping) {
      session.Print(DescribeSkipping(model, *measured.skipping));
      session.Print("without skipping:\n" + EvalTable(unskipped, name));
    }
    session.PrintUsage();
  }
  return 0;
}

}  // namespace

void AddEval(CLI::App& app, Session& session) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* verb = app.add_subcommand("eval", "Measure a model");
  verb->require_subcommand(1);
  CLI::App* ppl = verb->add_subcommand("ppl", "Perplexity of texts under a named protocol");
  ppl->set_help_flag("-h,--help", "Help");
  ppl->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  ppl->add_option("-f,--text", flags->texts, "Text file(s): .txt, .jsonl, also .xz .zst .gz");
  ppl->add_option("--ids", flags->ids, "Token id file(s): rows are windows");
  ppl->add_option("--against", flags->against, "Original model: adds the paired difference");
  ppl->add_option("--protocol", flags->protocol,
                  "bos-512 (default), plain-512, gptq-wikitext2-2048, llamacpp-512");
  ppl->add_option("--tokens", flags->max_tokens, "Tokens of each text (default: all whole windows)")
      ->check(WholeNumberFrom(1));
  ppl->add_option("--field", flags->field, "Key of the text in .jsonl (default text)");
  ppl->add_option("--plan", flags->plan, "Behave as if this plan were applied");
  ppl->add_flag("--no-skip", flags->no_skip, "Run every expert, whatever config.json says");
  session.AddComputeFlags(*ppl);
  ppl->add_flag("--dry-run", session.flags.dry_run, "Say what would be held; do nothing");
  session.AddReportFlags(*ppl);
  ppl->footer("Example: winnow eval ppl SMALLER --text prose.txt code.txt --against MODEL");
  ppl->callback([&session, flags] {
    session.action = [&session, flags] { return RunEvalPpl(session, *flags); };
  });
  AddEvalTasks(*verb, session);
}

}  // namespace winnow::cli
