// winnow serve: a model behind an OpenAI-compatible HTTP server.
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <optional>
#include <thread>

#include "base/checked_math.h"
#include "base/error.h"
#include "base/units.h"
#include "chat/chat_template.h"
#include "generate/batch_runner.h"
#include "pruning.h"
#include "serve/batch_adapter.h"
#include "serve/body_budget.h"
#include "serve/request.h"
#include "serve/server.h"
#include "session.h"
#include "tokenizer/tokenizer.h"

namespace winnow::cli {
namespace {

constexpr int64_t kMostSlots = 8;  // by default
constexpr int64_t kLongestContext = int64_t{1} << 30;
constexpr int64_t kUsualContext = 4096;  // by default, if the model has as much
constexpr uint64_t kShareOfBodies = 8;   // an eighth of the budget at most
constexpr const char* kPrompts = "prompts of requests";
constexpr auto kLook = std::chrono::milliseconds(50);  // how often Ctrl-C is looked for

struct ServeFlags {
  std::string model, plan, name, api_key;
  ServerOptions server;
  int64_t slots = 0, context = 0, queue = 64;
  double timeout_seconds = 600, grace_seconds = 10;
  bool no_skip = false;
};

// A message on stderr from any thread, whole.
void LogFault(Session& session, std::mutex& mutex, const std::string& what) {
  const std::lock_guard lock(mutex);
  session.Warn(what);
}

int64_t ContextOf(Session& session, const Model& model, const ServeFlags& flags) {
  if (flags.context > kLongestContext) {
    throw UsageError(fmt::format("--context {}: no sequence is that long", flags.context),
                     fmt::format("give {} tokens at most", kLongestContext));
  }
  const int64_t most = model.config().max_position_embeddings;
  if (flags.context == 0) return most > 0 ? std::min(most, kUsualContext) : kUsualContext;
  if (most > 0 && flags.context > most) {
    session.Warn(
        fmt::format("--context {} exceeds the model's own {} tokens", flags.context, most));
  }
  return flags.context;
}

// Prompt tokens that all requests may have together: as many as the largest one.
uint64_t PromptTokens(int64_t context_tokens) {
  return CheckedMul(kMaxSequencesPerRequest, static_cast<uint64_t>(context_tokens), kPrompts);
}
// Their ids, and once more with their text and its places where an answer repeats the prompt.
uint64_t PromptBytes(int64_t context_tokens) {
  constexpr uint64_t kTokenBytes = 16;
  return CheckedMul(PromptTokens(context_tokens), kTokenBytes, kPrompts);
}

BatchOptions PlanSlots(Session& session, const Model& model, const ServeFlags& flags,
                       uint64_t other_bytes) {
  BatchOptions options;
  options.context_tokens = ContextOf(session, model, flags);
  const uint64_t budget = session.memory_budget();
  other_bytes = CheckedAdd(other_bytes, PromptBytes(options.context_tokens), kPrompts);
  options.memory_budget_bytes = budget > other_bytes ? budget - other_bytes : 0;
  options.compute = session.compute();
  options.kept_experts = WhatIf(session, model, flags.plan);
  options.skip_betas = SkippingOf(model, flags.plan, flags.no_skip);
  const int threads = session.pool().num_threads();
  options.slots =
      flags.slots > 0
          ? flags.slots
          : std::max<int64_t>(1, BatchRunner::SlotsThatFit(model, options, kMostSlots, threads));
  return options;
}

ServedModel Describe(const Model& model, const ServeFlags& flags, const BatchOptions& options,
                     std::optional<ChatTemplate> chat_template) {
  ServedModel served;
  served.name = flags.name;
  served.created = static_cast<int64_t>(std::time(nullptr));
  served.slots = options.slots;
  served.moe_layers = model.config().MoeLayers();
  for (const int32_t layer : served.moe_layers) {
    served.num_experts.push_back(model.config().layers[static_cast<size_t>(layer)].num_experts);
  }
  served.experts_per_token = model.config().num_experts_per_tok;
  served.default_timeout_seconds = flags.timeout_seconds;
  if (chat_template) {
    served.render_chat = [chat = std::move(*chat_template)](const OrderedJson& messages,
                                                            bool prompted,
                                                            const OrderedJson& variables) {
      ChatOptions chat_options;
      chat_options.add_generation_prompt = prompted;
      chat_options.variables = variables;
      return chat.Render(messages, chat_options);
    };
  }
  return served;
}

// Model, scheduler and server, each in its thread, until Ctrl-C.
int ServeModel(Session& session, ServeFlags& flags, const Model& model, const Tokenizer& tokenizer,
               const BatchOptions& options, const MemoryPlan& plan) {
  std::atomic<bool> abandoned{false};
  JobControl control;
  control.interrupted = &abandoned;
  std::optional<BatchRunner> runner;
  {
    const EndOnInterrupt until_loaded;
    runner.emplace(model, options, session.pool(), control);
  }
  BatchAdapter adapter(*runner);
  std::mutex log;
  SchedulerOptions scheduling;
  scheduling.max_queued_requests = flags.queue;
  scheduling.max_prompt_tokens = static_cast<int64_t>(PromptTokens(options.context_tokens));
  scheduling.vocabulary = {model.config().eos_token_ids, tokenizer.vocab_size(),
                           static_cast<int64_t>(model.config().MoeLayers().size())};
  scheduling.abandoned = &abandoned;
  scheduling.on_fault = [&](const std::string& what) { LogFault(session, log, what); };
  flags.server.on_fault = scheduling.on_fault;
  uint64_t cache_bytes = 0;
  for (const MemoryItem& item : plan.items()) {
    if (item.what.starts_with("key-value")) cache_bytes += item.bytes;
  }
  Metrics metrics({options.slots, options.context_tokens, plan.items().front().bytes, cache_bytes});
  Scheduler scheduler(adapter, tokenizer, scheduling, metrics);
  ApiService service(Describe(model, flags, options, ChatTemplate::Load(flags.model)), tokenizer,
                     scheduler);
  Server server(flags.server, service, metrics);
  const int port = server.Bind();
  std::atomic<bool> idle{false};
  std::thread scheduling_thread([&] {
    scheduler.Run();
    idle = true;
  });
  std::thread serving_thread([&] { server.Run(); });
  const std::string& host = flags.server.host;
  const bool is_ipv6 = host.find(':') != std::string::npos;
  session.Print(fmt::format("listening on http://{}:{}", is_ipv6 ? "[" + host + "]" : host, port));
  session.Note(fmt::format("{} slot(s) of {} tokens, {} requests may wait; Ctrl-C stops",
                           options.slots, options.context_tokens, flags.queue));
  while (!g_interrupted) std::this_thread::sleep_for(kLook);

  session.Note("stopping: running requests may finish, a second Ctrl-C ends them");
  server.BeginStop();
  scheduler.BeginStop();
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                       std::chrono::duration<double>(flags.grace_seconds));
  while (!idle && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(kLook);
  abandoned = true;
  scheduling_thread.join();
  server.Stop();
  serving_thread.join();
  session.PrintUsage();
  return 0;
}

int RunServe(Session& session, ServeFlags& flags) {
  const Model model = Model::Open(flags.model);
  if (!fs::exists(fs::path(flags.model) / "tokenizer.json")) {
    throw UsageError(fmt::format("{} has no tokenizer.json, so it takes no text", flags.model),
                     "put the model's tokenizer.json into the folder");
  }
  if (const char* key = std::getenv("WINNOW_API_KEY"); flags.api_key.empty() && key != nullptr) {
    flags.api_key = key;
  }
  flags.server.api_key = flags.api_key;
  if (flags.name.empty()) flags.name = fs::canonical(flags.model).filename().string();
  const uint64_t tokenizer_bytes = Tokenizer::EstimateBytes(flags.model);
  size_t& body_bytes = flags.server.max_body_bytes;
  body_bytes = LargestBodyWithin(session.memory_budget() / kShareOfBodies, body_bytes);
  const uint64_t bodies_bytes = BodyMemoryBytes(body_bytes);
  const BatchOptions options = PlanSlots(session, model, flags, tokenizer_bytes + bodies_bytes);
  MemoryPlan plan = BatchRunner::Plan(model, options, session.pool().num_threads());
  plan.Add("tokenizer", tokenizer_bytes);
  plan.Add("bodies of requests", bodies_bytes);
  plan.Add(kPrompts, PromptBytes(options.context_tokens));
  plan.Add("logits of all slots", static_cast<uint64_t>(options.slots) *
                                      static_cast<uint64_t>(model.config().vocab_size) *
                                      sizeof(float));
  session.RequireMemory(plan, "serve");
  if (session.flags.dry_run) {
    session.PrintDryRun("serve", {{"slots", options.slots}, {"context", options.context_tokens}});
    return 0;
  }
  const Tokenizer tokenizer = Tokenizer::Load(flags.model);
  if (flags.server.host != "127.0.0.1" && flags.server.host != "localhost" &&
      flags.server.host != "::1" && flags.api_key.empty()) {
    session.Warn("whoever reaches this address may use the model: there is no --api-key");
  }
  return ServeModel(session, flags, model, tokenizer, options, plan);
}

}  // namespace

void AddServe(CLI::App& app, Session& session) {
  auto flags = std::make_shared<ServeFlags>();
  CLI::App* verb = app.add_subcommand("serve", "Answer OpenAI-style requests over HTTP");
  verb->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  verb->add_option("--host", flags->server.host, "Address to listen on (default 127.0.0.1)");
  verb->add_option("--port", flags->server.port, "Port (default 8080; 0: any that is free)")
      ->check(CLI::Range(0, 65535));
  verb->add_option("--slots", flags->slots,
                   "Sequences at once (default: what fits the budget, at most 8)")
      ->check(WholeNumberFrom(1))
      ->check(CLI::Range(1, 1024));
  verb->add_option("--context", flags->context,
                   "Tokens of a sequence, prompt and answer (default: the model's, at most 4096)")
      ->check(WholeNumberFrom(1));
  verb->add_option("--queue", flags->queue,
                   "Requests that may wait (default 64); others are told 429")
      ->check(WholeNumberFrom(1));
  verb->add_option("--timeout", flags->timeout_seconds,
                   "Seconds a request may take (default 600; 0: any time)")
      ->check(NumberFromTo(0, 1e6));
  verb->add_option("--grace", flags->grace_seconds,
                   "Seconds that running requests have left after Ctrl-C (default 10)")
      ->check(NumberFromTo(0, 1e6));
  verb->add_option("--api-key", flags->api_key,
                   "Key that clients must send (default: the variable WINNOW_API_KEY)");
  verb->add_option("--cors", flags->server.cors_origin,
                   "Origin whose pages may call the server, or * (default: none)");
  verb->add_option("--model-name", flags->name, "Name for clients (default: the folder's)");
  verb->add_option("--plan", flags->plan, "Behave as if this plan were applied");
  verb->add_flag("--no-skip", flags->no_skip, "Run every expert, whatever config.json says");
  verb->add_flag("--dry-run", session.flags.dry_run, "Say what would be held; do nothing");
  session.AddComputeFlags(*verb);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow serve MODEL --port 8080, then open http://127.0.0.1:8080");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunServe(session, *flags); };
  });
}

}  // namespace winnow::cli
