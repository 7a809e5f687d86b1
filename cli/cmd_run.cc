// winnow run: continues a prompt.
#include <fmt/format.h>

#include <cstdio>
#include <optional>

#include "base/error.h"
#include "generate/generator.h"
#include "pruning.h"
#include "session.h"
#include "text/text_source.h"
#include "tokenizer/tokenizer.h"

namespace winnow::cli {
namespace {

struct RunFlags {
  std::string model, prompt, ids, plan;
  GenerateOptions options;
  bool ignore_eos = false, no_skip = false;
};

int RunIds(Session& session, RunFlags& flags, const Model& model) {
  const TokenSequences rows = ReadTokenIds(flags.ids);
  OrderedJson tokens = OrderedJson::array();
  for (int64_t i = 0; i < rows.size(); ++i) {
    const auto begin = static_cast<size_t>(rows.offsets[static_cast<size_t>(i)]);
    const auto end = static_cast<size_t>(rows.offsets[static_cast<size_t>(i) + 1]);
    const std::span<const int32_t> prompt = std::span(rows.ids).subspan(begin, end - begin);
    const GeneratePlan plan =
        PlanGenerate(model, static_cast<int64_t>(prompt.size()) + flags.options.max_new_tokens,
                     flags.options, session.pool().num_threads());
    session.RequireMemory(plan.memory, "run");
    const GenerateResult result = Generate(model, prompt, flags.options, plan, session.pool(),
                                           session.control(), [](int32_t) { return true; });
    tokens.push_back(result.tokens);
    if (!session.flags.json) session.Print(OrderedJson(result.tokens).dump());
  }
  if (session.flags.json) session.PrintJson({{"schema", "winnow.run/1"}, {"tokens", tokens}});
  return 0;
}

int RunVerb(Session& session, RunFlags& flags) {
  if (flags.prompt.empty() == flags.ids.empty())
    throw UsageError("give either -p TEXT or --ids FILE");
  const Model model = Model::Open(flags.model);
  flags.options.memory_budget_bytes = session.memory_budget();
  flags.options.stop_at_eos = !flags.ignore_eos;
  flags.options.compute = session.compute();
  flags.options.kept_experts = WhatIf(session, model, flags.plan);
  flags.options.skip_betas = SkippingOf(model, flags.plan, flags.no_skip);
  if (!flags.ids.empty()) return RunIds(session, flags, model);
  if (!fs::exists(fs::path(flags.model) / "tokenizer.json")) {
    throw UsageError(
        fmt::format("{} has no tokenizer.json, so it takes no text", flags.model),
        "give token ids with --ids, or put the model's tokenizer.json into the folder");
  }
  const Tokenizer tokenizer = Tokenizer::Load(flags.model);
  flags.options.vocabulary_limit = tokenizer.vocab_size();
  const std::vector<int32_t> prompt = tokenizer.Encode(flags.prompt, true);
  const GeneratePlan plan =
      PlanGenerate(model, static_cast<int64_t>(prompt.size()) + flags.options.max_new_tokens,
                   flags.options, session.pool().num_threads());
  session.RequireMemory(plan.memory, "run");
  const int64_t context = model.config().max_position_embeddings;
  if (context > 0 && static_cast<int64_t>(prompt.size()) + flags.options.max_new_tokens > context) {
    session.Warn(
        fmt::format("{} prompt tokens and up to {} new ones exceed the model's context of {}",
                    prompt.size(), flags.options.max_new_tokens, context));
  }
  if (!plan.resident)
    session.Note("the model does not fit the budget: layers are read again for every token");
  // The prompt is decoded too, so that the continuation joins it as the tokenizer would write it.
  StreamDecoder decoder(tokenizer, true);
  std::string text;
  for (const int32_t id : prompt) text += decoder.Put(id);
  if (!session.flags.json) std::fputs(text.c_str(), stdout);
  std::string continuation;
  const auto show = [&](const std::string& piece) {
    continuation += piece;
    if (session.flags.json) return;
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
  };
  const GenerateResult result = Generate(model, prompt, flags.options, plan, session.pool(),
                                         session.control(), [&](int32_t token) {
                                           show(decoder.Put(token));
                                           return true;
                                         });
  show(decoder.Finish());
  if (session.flags.json) {
    OrderedJson json = {{"schema", "winnow.run/1"},
                        {"tokens", OrderedJson::array({result.tokens})},
                        {"text", continuation},
                        {"prompt_tokens", prompt.size()},
                        {"prompt_seconds", result.prompt_seconds},
                        {"decode_seconds", result.decode_seconds}};
    if (result.skipping) json.update(SkippingJson(model, *result.skipping));
    session.PrintJson(json);
  } else {
    std::fputc('\n', stdout);
    session.Note(fmt::format(
        "{} prompt tokens at {:.0f}/s, {} new at {:.1f}/s", prompt.size(),
        static_cast<double>(prompt.size()) / std::max(1e-9, result.prompt_seconds),
        result.tokens.size(),
        static_cast<double>(result.tokens.size()) / std::max(1e-9, result.decode_seconds)));
    if (result.skipping) session.Note(DescribeSkipping(model, *result.skipping));
  }
  return 0;
}

}  // namespace

void AddRun(CLI::App& app, Session& session) {
  auto flags = std::make_shared<RunFlags>();
  CLI::App* verb = app.add_subcommand("run", "Continue a prompt");
  verb->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  verb->add_option("-p,--prompt", flags->prompt, "Text to continue");
  verb->add_option("--ids", flags->ids, "Token ids to continue, each row of input_ids");
  verb->add_option("-n,--max-new-tokens", flags->options.max_new_tokens,
                   "New tokens at most (default 128)")
      ->check(WholeNumberFrom(1));
  verb->add_option("--temp", flags->options.sampling.temperature, "Temperature (default 0: greedy)")
      ->check(NumberFromTo(0, 100));
  verb->add_option("--top-k", flags->options.sampling.top_k, "Sample among the k likeliest")
      ->check(WholeNumberFrom(0));
  verb->add_option("--top-p", flags->options.sampling.top_p,
                   "Sample among the likeliest that reach p")
      ->check(NumberFromTo(0, 1));
  verb->add_option("--seed", flags->options.sampling.seed, "Seed (default 42)");
  verb->add_flag("--ignore-eos", flags->ignore_eos, "Go on after the end-of-sequence token");
  verb->add_option("--plan", flags->plan, "Behave as if this plan were applied");
  verb->add_flag("--no-skip", flags->no_skip, "Run every expert, whatever config.json says");
  session.AddComputeFlags(*verb);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow run MODEL -p \"Once upon a time\" -n 40 --temp 0.8");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunVerb(session, *flags); };
  });
}

}  // namespace winnow::cli
