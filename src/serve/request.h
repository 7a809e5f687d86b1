// Bodies of the completion endpoints, checked. What is accepted is in docs/SERVING.md; the rule: a
// field that would change the answer is honoured or refused by name, a field that cannot change it
// is ignored.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"             // OrderedJson
#include "generate/generator.h"    // SamplingOptions
#include "generate/logit_rules.h"  // LogitRules
#include "serve/api_error.h"       // ApiError

namespace winnow {

// Sequences one request may ask for: prompts times n.
inline constexpr int64_t kMaxSequencesPerRequest = 256;

struct GenerationSettings {
  SamplingOptions sampling = {.temperature = 1.0f};  // its seed is `seed`, or drawn by the server
  LogitRules rules = {};
  std::optional<uint64_t> seed;
  std::optional<int64_t> max_tokens;  // nothing: what is left of the context
  int64_t choices = 1;                // n
  std::vector<std::string> stop;
  std::optional<int> top_logprobs;  // nothing: no log-probabilities
  bool stream = false;
  bool include_usage = false;
  bool stop_at_eos = true;
  bool report_experts = false;
  std::optional<double> timeout_seconds;
};

// Text, or token ids that are taken as they are.
struct Prompt {
  std::string text;
  std::vector<int32_t> ids;
  bool is_ids = false;
};

struct CompletionRequest {
  std::string model;
  std::vector<Prompt> prompts;
  bool echo = false;
  GenerationSettings settings;
};

struct ChatRequest {
  std::string model;
  OrderedJson messages;  // contents are strings: text parts are joined by line breaks
  bool add_generation_prompt = true;
  OrderedJson template_variables = OrderedJson::object();  // chat_template_kwargs
  GenerationSettings settings;
};

struct TokenizeRequest {
  std::string text;
  bool add_special_tokens = false;
  bool with_pieces = false;
};

// A JSON object from a body; ApiError 400 for anything else.
OrderedJson ParseBody(std::string_view body);

// ApiError 400 naming the field. Token ids and biases outside [0, vocab_size) are refused.
CompletionRequest ParseCompletionRequest(const OrderedJson& body, int64_t vocab_size);
ChatRequest ParseChatRequest(const OrderedJson& body, int64_t vocab_size);
TokenizeRequest ParseTokenizeRequest(const OrderedJson& body);
// {"tokens": [..]}
std::vector<int32_t> ParseDetokenizeRequest(const OrderedJson& body, int64_t vocab_size);

}  // namespace winnow
