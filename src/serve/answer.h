// The JSON of an answer: one object, or the chunks of a stream. Collects what the scheduler yields,
// in the forms of OpenAI's completions and chat completions; extensions stand under `timings` and
// `winnow` (docs/SERVING.md).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"            // OrderedJson
#include "serve/generation.h"     // SequenceEvent
#include "tokenizer/tokenizer.h"  // Tokenizer

namespace winnow {

// A prompt as echoed: its text and where in it each token begins, in characters.
struct PromptText {
  std::vector<int32_t> ids;
  std::string text;
  std::vector<int64_t> offsets;  // [ids]
};
// `text` is what the client wrote, empty for a prompt of ids.
PromptText EchoOf(const Tokenizer& tokenizer, const std::vector<int32_t>& ids,
                  const std::string& text);

// The text of a token inside a longer text. Tokens that are no whole character give U+FFFD.
std::string TokenText(const Tokenizer& tokenizer, int32_t id);

struct AnswerForm {
  bool chat = false;
  std::string id, model;
  int64_t created = 0;  // Unix seconds
  uint64_t seed = 0;
  int64_t choices_per_prompt = 1;
  std::optional<int> top_logprobs;
  bool report_experts = false;
  int64_t moe_layers = 0;
  bool include_usage = false;    // of streams
  std::vector<PromptText> echo;  // per prompt; empty: not echoed
};

class Answer {
 public:
  // `tokenizer` must outlive it.
  Answer(AnswerForm form, size_t sequences, const Tokenizer& tokenizer);

  // Keeps an event for Whole().
  void Add(const SequenceEvent& event);
  // Turns an event into the chunks of a stream (none or more).
  std::vector<OrderedJson> Chunks(const SequenceEvent& event);
  // The chunks behind the last event: usage, if it was asked for.
  std::vector<OrderedJson> LastChunks() const;
  OrderedJson Whole() const;

 private:
  struct Choice {
    std::string text;
    std::vector<PositionScore> prompt_scores;
    std::vector<GeneratedToken> tokens;
    std::optional<FinishReason> finished;
    SequenceTimings timings;
    bool begun = false;  // something of it was streamed
  };
  const PromptText* EchoOfChoice(size_t sequence) const;
  OrderedJson Frame(const char* object) const;
  OrderedJson CompletionLogprobs(size_t sequence, const std::vector<GeneratedToken>& tokens,
                                 const std::vector<PositionScore>& prompt_scores,
                                 bool with_prompt) const;
  OrderedJson ChatLogprobs(const std::vector<GeneratedToken>& tokens) const;
  OrderedJson Experts(const std::vector<GeneratedToken>& tokens) const;
  OrderedJson Usage() const;
  OrderedJson Timings() const;

  const AnswerForm form_;
  const Tokenizer& tokenizer_;
  std::vector<Choice> choices_;
};

// One server-sent event.
std::string StreamEvent(const OrderedJson& json);

}  // namespace winnow
