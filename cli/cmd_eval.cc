// winnow eval ppl: perplexity under named protocols.
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
    original = Evaluate(session, reference, texts, {}, fs::temp_directory_path().string());
  }
  const std::vector<PerplexityResult> results =
      Evaluate(session, model, texts, WhatIf(session, model, flags.plan),
               fs::temp_directory_path().string());
  if (session.flags.dry_run) {
    int64_t tokens = 0;
    for (const EvalText& text : texts) tokens += text.windows.scored;
    session.PrintDryRun("eval ppl", {{"protocol", name}, {"tokens", tokens}});
    return 0;
  }
  std::vector<EvalRow> rows;
  for (size_t i = 0; i < texts.size(); ++i) {
    rows.push_back({texts[i].name, results[i], std::nullopt});
    if (!original.empty()) rows.back().original = original[i];
  }
  if (session.flags.json) {
    session.PrintJson(EvalJson(rows, name));
  } else {
    session.Print(EvalTable(rows, flags.ids.empty()
                                      ? protocol.name + " (" + protocol.description + ")"
                                      : "ids (rows are windows, positions 1.. scored)"));
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
  session.AddComputeFlags(*ppl);
  ppl->add_flag("--dry-run", session.flags.dry_run, "Say what would be held; do nothing");
  session.AddReportFlags(*ppl);
  ppl->footer("Example: winnow eval ppl SMALLER --text prose.txt code.txt --against MODEL");
  ppl->callback([&session, flags] {
    session.action = [&session, flags] { return RunEvalPpl(session, *flags); };
  });
}

}  // namespace winnow::cli
