#include "serve/request.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "serve/body_budget.h"
#include "serve/field_reader.h"

namespace winnow {
namespace {

constexpr size_t kMaxStopStrings = 16;
constexpr size_t kMaxStopBytes = 256;
constexpr size_t kMaxBiases = 1024;
constexpr int64_t kMaxTokens = int64_t{1} << 31;

// Who asks, what for, how it is billed and stored elsewhere: nothing that changes an answer.
const std::vector<std::string>& HarmlessFields() {
  static const std::vector<std::string> names = {"user",
                                                 "metadata",
                                                 "store",
                                                 "service_tier",
                                                 "safety_identifier",
                                                 "prompt_cache_key",
                                                 "prompt_cache_retention",
                                                 "parallel_tool_calls",
                                                 "cache_prompt"};
  return names;
}

std::vector<std::string> ReadStop(FieldReader& fields) {
  std::vector<std::string> stop;
  const OrderedJson* value = fields.Find("stop");
  if (value == nullptr) return stop;
  const std::string expected = fmt::format(
      "a string or a list of up to {} strings of 1 to {} bytes", kMaxStopStrings, kMaxStopBytes);
  const auto add = [&](const OrderedJson& one) {
    if (!one.is_string()) throw InvalidField("stop", expected);
    stop.push_back(one.get<std::string>());
    if (stop.back().empty() || stop.back().size() > kMaxStopBytes || stop.size() > kMaxStopStrings)
      throw InvalidField("stop", expected);
  };
  if (value->is_array()) {
    for (const OrderedJson& one : *value) add(one);
  } else {
    add(*value);
  }
  return stop;
}

std::vector<std::pair<int32_t, float>> ReadBiases(FieldReader& fields, int64_t vocab_size) {
  std::vector<std::pair<int32_t, float>> biases;
  const OrderedJson* value = fields.Find("logit_bias");
  if (value == nullptr) return biases;
  const std::string expected =
      fmt::format("an object of up to {} token ids (0 to {}) with numbers from -100 to 100",
                  kMaxBiases, vocab_size - 1);
  if (!value->is_object() || value->size() > kMaxBiases) throw InvalidField("logit_bias", expected);
  for (const auto& [key, bias] : value->items()) {
    int32_t id = -1;
    const auto [end, problem] = std::from_chars(key.data(), key.data() + key.size(), id);
    const double amount = bias.is_number() ? bias.get<double>() : std::nan("");
    if (problem != std::errc() || end != key.data() + key.size() || id < 0 || id >= vocab_size ||
        !(std::abs(amount) <= 100)) {
      throw InvalidField("logit_bias", expected);
    }
    biases.emplace_back(id, static_cast<float>(amount));
  }
  return biases;
}

void ReadStreaming(FieldReader& fields, GenerationSettings& settings) {
  settings.stream = fields.Flag("stream").value_or(false);
  const OrderedJson* value = fields.Find("stream_options");
  if (value == nullptr) return;
  if (!settings.stream) throw InvalidField("stream_options", "\"stream\": true beside it");
  FieldReader options(*value, "stream_options.");
  settings.include_usage = options.Flag("include_usage").value_or(false);
  options.Ignore({"include_obfuscation"});
  options.RefuseOthers();
}

void ReadExtension(FieldReader& fields, GenerationSettings& settings) {
  const OrderedJson* value = fields.Find("winnow");
  if (value == nullptr) return;
  FieldReader options(*value, "winnow.");
  settings.report_experts = options.Flag("experts").value_or(false);
  options.RefuseOthers();
}

// What both endpoints share.
GenerationSettings ReadSettings(FieldReader& fields, int64_t vocab_size) {
  GenerationSettings settings;
  SamplingOptions& sampling = settings.sampling;
  LogitRules& rules = settings.rules;
  if (const auto x = fields.Number("temperature", 0, 100)) {
    sampling.temperature = static_cast<float>(*x);
  }
  if (const auto x = fields.Number("top_p", 0, 1)) sampling.top_p = static_cast<float>(*x);
  if (const auto x = fields.Integer("top_k", -1, kMaxTokens)) {
    sampling.top_k = std::max<int64_t>(0, *x);  // -1 and 0 both mean all
  }
  if (const auto x = fields.Number("min_p", 0, 1)) rules.min_p = static_cast<float>(*x);
  if (const auto x = fields.Number("presence_penalty", -2, 2)) {
    rules.presence_penalty = static_cast<float>(*x);
  }
  if (const auto x = fields.Number("frequency_penalty", -2, 2)) {
    rules.frequency_penalty = static_cast<float>(*x);
  }
  if (const auto x = fields.Number("repetition_penalty", 0.01, 100)) {
    rules.repetition_penalty = static_cast<float>(*x);
  }
  rules.logit_bias = ReadBiases(fields, vocab_size);
  if (const auto x = fields.Integer("seed", INT64_MIN, INT64_MAX)) {
    settings.seed = static_cast<uint64_t>(*x);
  }
  settings.choices = fields.Integer("n", 1, kMaxSequencesPerRequest).value_or(1);
  settings.stop = ReadStop(fields);
  settings.stop_at_eos = !fields.Flag("ignore_eos").value_or(false);
  settings.timeout_seconds = fields.Number("timeout_seconds", 0.001, 1e6);
  ReadStreaming(fields, settings);
  ReadExtension(fields, settings);
  fields.Ignore(HarmlessFields());
  return settings;
}

std::vector<Prompt> ReadPrompts(FieldReader& fields, int64_t vocab_size) {
  const OrderedJson* value = fields.Find("prompt");
  const std::string expected =
      "a string, a list of strings, a list of token ids or a list of such lists";
  if (value == nullptr) throw InvalidField("prompt", expected);
  std::vector<Prompt> prompts;
  const auto add = [&](const OrderedJson& one) {
    if (one.is_string()) {
      prompts.push_back({one.get<std::string>(), {}, false});
    } else if (one.is_array()) {
      prompts.push_back({{}, ReadTokenIds(one, "prompt", vocab_size), true});
    } else {
      throw InvalidField("prompt", expected);
    }
  };
  const bool is_list = value->is_array() && !value->empty() && !value->front().is_number();
  if (!is_list) {
    add(*value);
  } else {
    if (value->size() > static_cast<size_t>(kMaxSequencesPerRequest)) {
      throw InvalidField("prompt", fmt::format("at most {} prompts", kMaxSequencesPerRequest));
    }
    for (const OrderedJson& one : *value) add(one);
  }
  return prompts;
}

void RefuseTools(FieldReader& fields) {
  for (const char* name : {"tools", "functions"}) {
    const OrderedJson* value = fields.Find(name);
    if (value != nullptr && !(value->is_array() && value->empty())) {
      throw UnsupportedField(name, "calling tools is not supported");
    }
  }
  for (const char* name : {"tool_choice", "function_call"}) {
    const OrderedJson* value = fields.Find(name);
    if (value != nullptr && *value != "none" && *value != "auto") {
      throw UnsupportedField(name, "calling tools is not supported");
    }
  }
}

void RequireTextFormat(FieldReader& fields) {
  const OrderedJson* value = fields.Find("response_format");
  if (value == nullptr) return;
  FieldReader format(*value, "response_format.");
  if (format.Text("type").value_or("") != "text") {
    throw UnsupportedField("response_format", "only {\"type\": \"text\"} is supported");
  }
  format.RefuseOthers();
}

// A message's content as one string; nothing where it is null.
void FlattenContent(OrderedJson& message, size_t index) {
  const std::string where = fmt::format("messages[{}].content", index);
  auto content = message.find("content");
  if (content == message.end()) throw InvalidField(where, "a string or a list of text parts");
  if (content->is_string() || content->is_null()) return;
  if (!content->is_array()) throw InvalidField(where, "a string or a list of text parts");
  std::string text;
  for (const OrderedJson& part : *content) {
    const bool is_text = part.is_object() && part.contains("type") && part["type"] == "text" &&
                         part.contains("text") && part["text"].is_string();
    if (!is_text) throw UnsupportedField(where, "only parts of type \"text\" are supported");
    if (!text.empty()) text += '\n';
    text += part["text"].get<std::string>();
  }
  *content = text;
}

OrderedJson ReadMessages(FieldReader& fields) {
  const OrderedJson* value = fields.Find("messages");
  if (value == nullptr || !value->is_array() || value->empty()) {
    throw InvalidField("messages", "a list of at least one message");
  }
  OrderedJson messages = *value;
  for (size_t i = 0; i < messages.size(); ++i) {
    OrderedJson& message = messages[i];
    const std::string where = fmt::format("messages[{}]", i);
    if (!message.is_object()) throw InvalidField(where, "an object with role and content");
    if (!message.contains("role") || !message["role"].is_string()) {
      throw InvalidField(where + ".role", "a string such as \"system\", \"user\", \"assistant\"");
    }
    if (message.contains("tool_calls") && !message["tool_calls"].is_null()) {
      throw UnsupportedField(where + ".tool_calls", "calling tools is not supported");
    }
    FlattenContent(message, i);
  }
  return messages;
}

// An upper bound, without building anything: what begins a value or follows one, outside strings.
size_t CountValues(std::string_view json) {
  size_t count = 1;
  bool in_string = false;
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (c == '"') in_string = !in_string;
    if (in_string && c == '\\') ++i;
    if (!in_string && (c == ',' || c == '[' || c == '{')) ++count;
  }
  return count;
}

}  // namespace

OrderedJson ParseBody(std::string_view body) {
  if (CountValues(body) > kMaxBodyValues) {
    throw ApiError(413, "too_many_values",
                   fmt::format("the body may have {} JSON values at most", kMaxBodyValues));
  }
  OrderedJson json;
  try {
    json = ParseOrderedJson(body, "the request's body");
  } catch (const ModelError& error) {
    throw ApiError(400, "invalid_json", error.what());
  }
  if (!json.is_object()) throw InvalidField("body", "a JSON object");
  return json;
}

CompletionRequest ParseCompletionRequest(const OrderedJson& body, int64_t vocab_size) {
  FieldReader fields(body);
  CompletionRequest request;
  request.model = fields.Text("model").value_or("");
  request.prompts = ReadPrompts(fields, vocab_size);
  request.settings = ReadSettings(fields, vocab_size);
  GenerationSettings& settings = request.settings;
  settings.max_tokens = fields.Integer("max_tokens", 0, kMaxTokens).value_or(16);
  request.echo = fields.Flag("echo").value_or(false);
  if (const auto count = fields.Integer("logprobs", 0, 5)) {
    settings.top_logprobs = static_cast<int>(*count);
  }
  const int64_t best_of = fields.Integer("best_of", 1, kMaxTokens).value_or(settings.choices);
  if (best_of != settings.choices) {
    throw UnsupportedField("best_of", "choosing among more than n answers is not supported");
  }
  if (!fields.Text("suffix").value_or("").empty()) {
    throw UnsupportedField("suffix", "inserting text before a suffix is not supported");
  }
  const auto sequences = static_cast<int64_t>(request.prompts.size()) * settings.choices;
  if (sequences > kMaxSequencesPerRequest) {
    throw InvalidField("n",
                       fmt::format("at most {} choices over all prompts", kMaxSequencesPerRequest));
  }
  fields.RefuseOthers();
  return request;
}

ChatRequest ParseChatRequest(const OrderedJson& body, int64_t vocab_size) {
  FieldReader fields(body);
  ChatRequest request;
  request.model = fields.Text("model").value_or("");
  request.messages = ReadMessages(fields);
  request.settings = ReadSettings(fields, vocab_size);
  GenerationSettings& settings = request.settings;
  settings.max_tokens = fields.Integer("max_tokens", 0, kMaxTokens);
  // The newer name of the same bound.
  if (const auto bound = fields.Integer("max_completion_tokens", 0, kMaxTokens)) {
    if (settings.max_tokens && *settings.max_tokens != *bound) {
      throw InvalidField("max_completion_tokens", "the same number as max_tokens, or only one");
    }
    settings.max_tokens = bound;
  }
  const bool wants_logprobs = fields.Flag("logprobs").value_or(false);
  const auto top = fields.Integer("top_logprobs", 0, 20);
  if (top && !wants_logprobs) throw InvalidField("top_logprobs", "\"logprobs\": true beside it");
  if (wants_logprobs) settings.top_logprobs = static_cast<int>(top.value_or(0));
  RefuseTools(fields);
  RequireTextFormat(fields);
  request.add_generation_prompt = fields.Flag("add_generation_prompt").value_or(true);
  if (const OrderedJson* variables = fields.Find("chat_template_kwargs")) {
    if (!variables->is_object()) throw InvalidField("chat_template_kwargs", "an object");
    request.template_variables = *variables;
  }
  fields.RefuseOthers();
  return request;
}

TokenizeRequest ParseTokenizeRequest(const OrderedJson& body) {
  FieldReader fields(body);
  TokenizeRequest request;
  const std::optional<std::string> content = fields.Text("content");
  const std::optional<std::string> prompt = fields.Text("prompt");
  if (content.has_value() == prompt.has_value()) {
    throw InvalidField("content", "a string (or as \"prompt\", but not both)");
  }
  request.text = content ? *content : *prompt;
  request.add_special_tokens =
      fields.Flag(content ? "add_special" : "add_special_tokens").value_or(prompt.has_value());
  request.with_pieces = fields.Flag("with_pieces").value_or(false);
  fields.Ignore({"model"});
  fields.RefuseOthers();
  return request;
}

std::vector<int32_t> ParseDetokenizeRequest(const OrderedJson& body, int64_t vocab_size) {
  FieldReader fields(body);
  const OrderedJson* tokens = fields.Find("tokens");
  if (tokens == nullptr) throw InvalidField("tokens", "a list of token ids");
  fields.Ignore({"model"});
  fields.RefuseOthers();
  return ReadTokenIds(*tokens, "tokens", vocab_size);
}

}  // namespace winnow
