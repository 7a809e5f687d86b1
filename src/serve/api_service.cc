#include "serve/api_service.h"

#include <fmt/format.h>

#include <ctime>
#include <random>

namespace winnow {
namespace {

uint64_t FreshSeed() {
  std::random_device device;
  // Below 2^53, so that a client that reads numbers as doubles can give it back.
  return ((static_cast<uint64_t>(device()) << 32) | device()) >> 11;
}

}  // namespace

ApiService::ApiService(ServedModel model, const Tokenizer& tokenizer, Scheduler& scheduler)
    : model_(std::move(model)), tokenizer_(tokenizer), scheduler_(scheduler) {}

void ApiService::RequireModel(const std::string& name) const {
  if (name.empty() || name == model_.name) return;
  throw ApiError(
      404, "model_not_found",
      fmt::format("model: there is no \"{}\" here, only \"{}\"", name.substr(0, 128), model_.name),
      "model");
}

AnswerForm ApiService::NewForm(const GenerationSettings& settings, bool chat) {
  AnswerForm form;
  form.chat = chat;
  form.created = static_cast<int64_t>(std::time(nullptr));
  form.id = fmt::format("{}-{:x}-{:x}", chat ? "chatcmpl" : "cmpl", model_.created, ++requests_);
  form.model = model_.name;
  form.seed = settings.seed ? *settings.seed : FreshSeed();
  form.choices_per_prompt = settings.choices;
  form.top_logprobs = settings.top_logprobs;
  form.report_experts = settings.report_experts;
  form.moe_layers = static_cast<int64_t>(model_.moe_layers.size());
  form.include_usage = settings.include_usage;
  return form;
}

ApiService::Job ApiService::Start(const std::vector<PromptText>& prompts,
                                  const GenerationSettings& settings, bool score_prompts,
                                  AnswerForm form) {
  std::vector<SequenceSpec> specs;
  for (const PromptText& prompt : prompts) {
    for (int64_t choice = 0; choice < settings.choices; ++choice) {
      SequenceSpec spec{.prompt = prompt.ids,
                        .max_tokens = settings.max_tokens.value_or(INT64_MAX),
                        .sampling = settings.sampling,
                        .rules = settings.rules,
                        .stop = settings.stop,
                        .stop_at_eos = settings.stop_at_eos,
                        .top_logprobs = settings.top_logprobs,
                        .score_prompt = score_prompts};
      spec.sampling.seed = form.seed + static_cast<uint64_t>(choice);
      specs.push_back(std::move(spec));
    }
  }
  std::optional<Generation::Clock::time_point> deadline;
  double seconds = model_.default_timeout_seconds;
  if (settings.timeout_seconds && (seconds <= 0 || *settings.timeout_seconds < seconds)) {
    seconds = *settings.timeout_seconds;
  }
  if (seconds > 0) {
    deadline = scheduler_.now() + std::chrono::duration_cast<Generation::Clock::duration>(
                                      std::chrono::duration<double>(seconds));
  }
  const size_t sequences = specs.size();
  auto generation = scheduler_.Submit(std::move(specs), deadline);
  return {std::move(generation), Answer(std::move(form), sequences, tokenizer_), settings.stream};
}

ApiService::Job ApiService::StartCompletion(std::string_view body) {
  const CompletionRequest request =
      ParseCompletionRequest(ParseBody(body), scheduler_.vocab_size());
  RequireModel(request.model);
  std::vector<PromptText> prompts;
  for (const Prompt& prompt : request.prompts) {
    const std::vector<int32_t> ids =
        prompt.is_ids ? prompt.ids : tokenizer_.Encode(prompt.text, true);
    if (request.echo) {
      prompts.push_back(EchoOf(tokenizer_, ids, prompt.text));
    } else {
      prompts.push_back({ids, {}, {}});
    }
  }
  AnswerForm form = NewForm(request.settings, false);
  if (request.echo) form.echo = prompts;
  const bool scored = request.echo && request.settings.top_logprobs.has_value();
  return Start(prompts, request.settings, scored, std::move(form));
}

ApiService::Job ApiService::StartChat(std::string_view body) {
  const ChatRequest request = ParseChatRequest(ParseBody(body), scheduler_.vocab_size());
  RequireModel(request.model);
  if (!model_.render_chat) {
    throw ApiError(400, "no_chat_template", "this model has no chat template; use /v1/completions",
                   "messages");
  }
  std::string text;
  try {
    text = model_.render_chat(request.messages, request.add_generation_prompt,
                              request.template_variables);
  } catch (const Error& error) {
    throw ApiError(400, "chat_template_error", error.what(), "messages");
  }
  // The template writes every special token itself.
  return Start({{tokenizer_.Encode(text, false), {}, {}}}, request.settings, false,
               NewForm(request.settings, true));
}

OrderedJson ApiService::Tokenize(std::string_view body, const ReserveMemory& reserve) const {
  const TokenizeRequest request = ParseTokenizeRequest(ParseBody(body));
  // A byte may be a token: its id twice, its JSON value (in a list that doubles), its digits in the
  // answer; with pieces an object of two names and a string too, three allocations of 32 to 96
  // bytes.
  constexpr uint64_t kIdBytes = 80, kPieceBytes = 480;  // measured: 55 and 450
  reserve(request.with_pieces ? kPieceBytes : kIdBytes, request.text.size());
  const std::vector<int32_t> ids = tokenizer_.Encode(request.text, request.add_special_tokens);
  OrderedJson tokens = OrderedJson::array();
  for (const int32_t id : ids) {
    if (request.with_pieces) {
      tokens.push_back({{"id", id}, {"piece", TokenText(tokenizer_, id)}});
    } else {
      tokens.push_back(id);
    }
  }
  OrderedJson answer;
  answer["tokens"] = std::move(tokens);
  answer["count"] = ids.size();
  answer["max_model_len"] = scheduler_.context_tokens();
  return answer;
}

OrderedJson ApiService::Detokenize(std::string_view body) const {
  const std::vector<int32_t> ids = ParseDetokenizeRequest(ParseBody(body), scheduler_.vocab_size());
  const std::string text = tokenizer_.Decode(ids, false);
  return {{"content", text}, {"prompt", text}};
}

OrderedJson ApiService::Models() const {
  return {{"object", "list"},
          {"data", OrderedJson::array({{{"id", model_.name},
                                        {"object", "model"},
                                        {"created", model_.created},
                                        {"owned_by", "winnow"},
                                        {"max_model_len", scheduler_.context_tokens()}}})}};
}

OrderedJson ApiService::Properties() const {
  return {{"model", model_.name},
          {"context_tokens", scheduler_.context_tokens()},
          {"slots", model_.slots},
          {"has_chat_template", static_cast<bool>(model_.render_chat)},
          {"moe_layers", model_.moe_layers},
          {"num_experts", model_.num_experts},
          {"experts_per_token", model_.experts_per_token}};
}

}  // namespace winnow
