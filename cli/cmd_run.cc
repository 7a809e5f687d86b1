// winnow run: continues a prompt.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <optional>

#include "base/error.h"
#include "conversations.h"
#include "generate/generator.h"
#include "interactive.h"
#include "pruning.h"
#include "session.h"
#include "text/text_source.h"
#include "text_answer.h"
#include "tokenizer/tokenizer.h"

namespace winnow::cli {
namespace {

struct RunFlags {
  std::string model, prompt, prompt_file, ids, plan, system;
  std::vector<std::string> stops;
  int64_t context = 0;
  GenerateOptions options;
  bool ignore_eos = false, no_skip = false, interactive = false, chat = false, raw = false;
  bool stats = false;
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

// Nothing if plain text is wanted, or the model has no template and nobody asked for one.
std::optional<ChatTemplate> TemplateFor(const RunFlags& flags) {
  if (flags.raw) return std::nullopt;
  if (flags.chat) return LoadChatTemplate(flags.model);
  return flags.interactive ? ChatTemplate::Load(flags.model) : std::nullopt;
}

int RunText(Session& session, const RunFlags& flags, const Model& model) {
  if (!fs::exists(fs::path(flags.model) / "tokenizer.json")) {
    throw UsageError(
        fmt::format("{} has no tokenizer.json, so it takes no text", flags.model),
        "give token ids with --ids, or put the model's tokenizer.json into the folder");
  }
  const Tokenizer tokenizer = Tokenizer::Load(flags.model);
  const int64_t context = model.config().max_position_embeddings;
  ConversationStart start = {TemplateFor(flags), flags.system, flags.stats};
  if (!flags.system.empty() && !start.chat_template) {
    throw UsageError("--system needs a chat template",
                     flags.raw ? "leave --raw out" : "add --chat, or -i with a model that has one");
  }
  if (flags.interactive) {
    const int64_t capacity = flags.context > 0 ? flags.context
                             : context > 0     ? std::min<int64_t>(context, 4096)
                                               : 4096;
    TextAnswerer answerer(session, model, tokenizer, capacity, flags.options, flags.stops);
    return RunInteractive(session, tokenizer, answerer, start);
  }
  OrderedJson messages = OrderedJson::array();
  if (!flags.system.empty()) messages.push_back({{"role", "system"}, {"content", flags.system}});
  messages.push_back({{"role", "user"}, {"content", flags.prompt}});
  const std::vector<int32_t> prompt = start.chat_template
                                          ? ChatPrompt(*start.chat_template, tokenizer, messages)
                                          : tokenizer.Encode(flags.prompt, true);
  const int64_t capacity =
      std::max(flags.context, static_cast<int64_t>(prompt.size()) + flags.options.max_new_tokens);
  if (context > 0 && static_cast<int64_t>(prompt.size()) + flags.options.max_new_tokens > context) {
    session.Warn(
        fmt::format("{} prompt tokens and up to {} new ones exceed the model's context of {}",
                    prompt.size(), flags.options.max_new_tokens, context));
  }
  TextAnswerer answerer(session, model, tokenizer, capacity, flags.options, flags.stops);
  if (!session.flags.json && !start.chat_template) {
    StreamDecoder decoder(tokenizer, true);
    std::string text;
    for (const int32_t id : prompt) text += decoder.Put(id);
    std::fputs(text.c_str(), stdout);
  }
  const TextAnswer answer = answerer.Answer(prompt, [&](const std::string& piece) {
    if (session.flags.json) return;
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
  });
  const GenerateResult& result = answer.result;
  if (session.flags.json) {
    OrderedJson json = {{"schema", "winnow.run/1"},
                        {"tokens", OrderedJson::array({result.tokens})},
                        {"text", answer.text}};
    json.update(SpeedJson(prompt.size(), result));
    if (result.skipping) json.update(SkippingJson(model, *result.skipping));
    session.PrintJson(json);
    return 0;
  }
  std::fputc('\n', stdout);
  std::fflush(stdout);  // before what stderr says
  session.Note(DescribeSpeed(prompt.size(), result, flags.stats));
  if (result.skipping) session.Note(DescribeSkipping(model, *result.skipping));
  return 0;
}

int RunVerb(Session& session, RunFlags& flags) {
  const int sources = (flags.prompt.empty() ? 0 : 1) + (flags.ids.empty() ? 0 : 1) +
                      (flags.prompt_file.empty() ? 0 : 1) + (flags.interactive ? 1 : 0);
  if (sources != 1) {
    throw UsageError(sources == 0 ? "there is no prompt"
                                  : "there is more than one prompt: -p, -f, --ids and -i exclude "
                                    "each other",
                     "give one of -p TEXT, -f FILE, --ids FILE and -i");
  }
  if (flags.raw && flags.chat)
    throw UsageError("--raw and --chat exclude each other", "leave one of them out");
  if (!flags.prompt_file.empty()) flags.prompt = ReadTextFile(flags.prompt_file);
  if (std::any_of(flags.stops.begin(), flags.stops.end(),
                  [](const std::string& stop) { return stop.empty(); })) {
    throw UsageError("--stop: an empty string ends every text at once",
                     "give a text, or leave --stop out");
  }
  const Model model = Model::Open(flags.model);
  flags.options.memory_budget_bytes = session.memory_budget();
  flags.options.stop_at_eos = !flags.ignore_eos;
  flags.options.compute = session.compute();
  flags.options.kept_experts = WhatIf(session, model, flags.plan);
  flags.options.skip_betas = SkippingOf(model, flags.plan, flags.no_skip);
  return flags.ids.empty() ? RunText(session, flags, model) : RunIds(session, flags, model);
}

}  // namespace

void AddRun(CLI::App& app, Session& session) {
  auto flags = std::make_shared<RunFlags>();
  CLI::App* verb = app.add_subcommand("run", "Continue a prompt, or talk to a model");
  verb->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  verb->add_option("-p,--prompt", flags->prompt, "Text to continue");
  verb->add_option("-f,--file", flags->prompt_file, "File with the text to continue");
  verb->add_flag("-i,--interactive", flags->interactive,
                 "A conversation: lines from the terminal, by the chat template if there is one");
  verb->add_flag("--chat", flags->chat, "The prompt is a user's message: use the chat template");
  verb->add_option("--system", flags->system, "System message, with --chat or -i");
  verb->add_flag("--raw", flags->raw, "-i without the chat template");
  verb->add_option("--stop", flags->stops, "End before this text; may be given several times");
  verb->add_option("--context", flags->context,
                   "Tokens of prompt and answer together (-i: default the model's, at most 4096)")
      ->check(WholeNumberFrom(2));
  verb->add_flag("--stats", flags->stats,
                 "Also what was cached, experts and bytes a token, time to load");
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
  verb->footer(
      "Example: winnow run MODEL -p \"Once upon a time\" -n 40 --temp 0.8\n"
      "         winnow run MODEL -i --system \"You answer in one sentence.\"");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunVerb(session, *flags); };
  });
}

}  // namespace winnow::cli
