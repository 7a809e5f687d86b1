#include "serve/answer.h"

#include <algorithm>

#include "forward/expert_skipping.h"
#include "serve/running_sequence.h"  // CountCharacters

namespace winnow {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

OrderedJson FinishJson(const std::optional<FinishReason>& reason) {
  if (!reason) return nullptr;
  return *reason == FinishReason::kStop ? "stop" : "length";
}

// The token and, in order, the likeliest: at most `top` of them.
std::span<const TokenScore> Likeliest(const PositionScore& score, int top) {
  return std::span(score.likeliest)
      .first(std::min(score.likeliest.size(), static_cast<size_t>(std::max(0, top))));
}

}  // namespace

std::string TokenText(const Tokenizer& tokenizer, int32_t id) {
  // Behind itself, because some decoders drop a space at the start of a text.
  const std::vector<int32_t> twice = {id, id};
  const std::string one = tokenizer.Decode(std::span(twice).first(1), false);
  const std::string two = tokenizer.Decode(twice, false);
  return two.size() > one.size() && two.starts_with(one) ? two.substr(one.size()) : one;
}

PromptText EchoOf(const Tokenizer& tokenizer, const std::vector<int32_t>& ids,
                  const std::string& text) {
  PromptText prompt{ids, {}, {}};
  // A BOS that the tokenizer put before a text is no part of what the client wrote.
  StreamDecoder decoder(tokenizer, false);
  int64_t characters = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    prompt.offsets.push_back(characters);
    if (i == 0 && !text.empty() && tokenizer.bos_id() == ids[0]) continue;
    const std::string piece = decoder.Put(ids[i]);
    characters += CountCharacters(piece);
    prompt.text += piece;
  }
  prompt.text += decoder.Finish();
  if (!text.empty()) prompt.text = text;
  return prompt;
}

std::string StreamEvent(const OrderedJson& json) {
  return "data: " + json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace) + "\n\n";
}

Answer::Answer(AnswerForm form, size_t sequences, const Tokenizer& tokenizer)
    : form_(std::move(form)), tokenizer_(tokenizer), choices_(sequences) {}

const PromptText* Answer::EchoOfChoice(size_t sequence) const {
  if (form_.echo.empty()) return nullptr;
  return &form_.echo[sequence / static_cast<size_t>(form_.choices_per_prompt)];
}

void Answer::Add(const SequenceEvent& event) {
  Choice& choice = choices_[event.sequence];
  choice.text += event.text;
  choice.tokens.insert(choice.tokens.end(), event.tokens.begin(), event.tokens.end());
  if (!event.prompt_scores.empty()) choice.prompt_scores = event.prompt_scores;
  if (event.finished) {
    choice.finished = event.finished;
    choice.timings = event.timings;
  }
}

OrderedJson Answer::Frame(const char* object) const {
  return {{"id", form_.id},
          {"object", object},
          {"created", form_.created},
          {"model", form_.model},
          {"choices", OrderedJson::array()}};
}

OrderedJson Answer::CompletionLogprobs(size_t sequence, const std::vector<GeneratedToken>& tokens,
                                       const std::vector<PositionScore>& prompt_scores,
                                       bool with_prompt) const {
  OrderedJson names = OrderedJson::array(), values = OrderedJson::array(),
              tops = OrderedJson::array(), offsets = OrderedJson::array();
  const auto add = [&](const PositionScore& score, int64_t offset) {
    // Several tokens may have one text: the likeliest of them is the one that is shown.
    OrderedJson top = OrderedJson::object();
    const auto put = [&](const TokenScore& one) {
      const std::string text = TokenText(tokenizer_, one.token);
      const auto found = top.find(text);
      if (found == top.end() || found->get<double>() < one.log_probability) {
        top[text] = one.log_probability;
      }
    };
    for (const TokenScore& one : Likeliest(score, *form_.top_logprobs)) put(one);
    put(score.chosen);
    names.push_back(TokenText(tokenizer_, score.chosen.token));
    values.push_back(score.chosen.log_probability);
    tops.push_back(std::move(top));
    offsets.push_back(offset);
  };
  const PromptText* echo = EchoOfChoice(sequence);
  if (echo != nullptr && with_prompt) {
    names.push_back(TokenText(tokenizer_, echo->ids.front()));
    values.push_back(nullptr);
    tops.push_back(nullptr);
    offsets.push_back(0);
    for (size_t i = 0; i < prompt_scores.size(); ++i) add(prompt_scores[i], echo->offsets[i + 1]);
  }
  const int64_t begin = echo != nullptr ? CountCharacters(echo->text) : 0;
  for (const GeneratedToken& token : tokens) add(*token.score, begin + token.text_offset);
  return {{"tokens", names},
          {"token_logprobs", values},
          {"top_logprobs", tops},
          {"text_offset", offsets}};
}

OrderedJson Answer::ChatLogprobs(const std::vector<GeneratedToken>& tokens) const {
  const auto entry = [&](const TokenScore& score) {
    const std::string text = TokenText(tokenizer_, score.token);
    OrderedJson bytes = nullptr;  // unknown where the token is part of a character
    if (text.find(kReplacement) == std::string::npos) {
      bytes = OrderedJson::array();
      for (const char c : text) bytes.push_back(static_cast<int>(static_cast<unsigned char>(c)));
    }
    return OrderedJson{{"token", text}, {"logprob", score.log_probability}, {"bytes", bytes}};
  };
  OrderedJson content = OrderedJson::array();
  for (const GeneratedToken& token : tokens) {
    OrderedJson one = entry(token.score->chosen), top = OrderedJson::array();
    for (const TokenScore& other : Likeliest(*token.score, *form_.top_logprobs)) {
      top.push_back(entry(other));
    }
    one["top_logprobs"] = std::move(top);
    content.push_back(std::move(one));
  }
  return {{"content", content}};
}

OrderedJson Answer::Experts(const std::vector<GeneratedToken>& tokens) const {
  OrderedJson offsets = OrderedJson::array(), experts = OrderedJson::array(),
              skipped = OrderedJson::array();
  const auto layers = static_cast<size_t>(form_.moe_layers);
  for (const GeneratedToken& token : tokens) {
    OrderedJson used_by_layer = OrderedJson::array(), skipped_by_layer = OrderedJson::array();
    const size_t k = layers == 0 ? 0 : token.experts.size() / layers;
    for (size_t layer = 0; layer < layers && k > 0; ++layer) {
      OrderedJson used = OrderedJson::array(), left_out = OrderedJson::array();
      for (size_t rank = 0; rank < k; ++rank) {
        const int32_t slot = token.experts[layer * k + rank];
        (IsSkipped(slot) ? left_out : used).push_back(ExpertOfSlot(slot));
      }
      used_by_layer.push_back(std::move(used));
      skipped_by_layer.push_back(std::move(left_out));
    }
    offsets.push_back(token.text_offset);
    experts.push_back(std::move(used_by_layer));
    skipped.push_back(std::move(skipped_by_layer));
  }
  return {{"text_offset", offsets}, {"experts", experts}, {"skipped", skipped}};
}

OrderedJson Answer::Usage() const {
  int64_t prompt = 0, cached = 0, generated = 0;
  for (size_t i = 0; i < choices_.size(); ++i) {
    const SequenceTimings& timings = choices_[i].timings;
    if (i % static_cast<size_t>(form_.choices_per_prompt) == 0) {
      prompt += timings.prompt_tokens;
      cached += timings.cached_tokens;
    }
    generated += timings.generated_tokens;
  }
  return {{"prompt_tokens", prompt},
          {"completion_tokens", generated},
          {"total_tokens", prompt + generated},
          {"prompt_tokens_details", {{"cached_tokens", cached}}}};
}

OrderedJson Answer::Timings() const {
  SequenceTimings sum;
  double experts = 0;
  for (const Choice& choice : choices_) {
    const SequenceTimings& one = choice.timings;
    sum.prompt_tokens += one.prompt_tokens - one.cached_tokens;
    sum.cached_tokens += one.cached_tokens;
    sum.generated_tokens += one.generated_tokens;
    sum.prompt_seconds += one.prompt_seconds;
    sum.generation_seconds += one.generation_seconds;
    experts += one.experts_per_token * static_cast<double>(one.generated_tokens);
  }
  const auto tokens = static_cast<double>(std::max<int64_t>(1, sum.generated_tokens));
  return {{"prompt_n", sum.prompt_tokens},       {"prompt_seconds", sum.prompt_seconds},
          {"predicted_n", sum.generated_tokens}, {"predicted_seconds", sum.generation_seconds},
          {"cached_n", sum.cached_tokens},       {"experts_per_token", experts / tokens}};
}

OrderedJson Answer::Whole() const {
  OrderedJson json = Frame(form_.chat ? "chat.completion" : "text_completion");
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = choices_[i];
    const PromptText* echo = EchoOfChoice(i);
    OrderedJson one = {{"index", i}};
    if (form_.chat) {
      one["message"] = {{"role", "assistant"}, {"content", choice.text}};
    } else {
      one["text"] = echo != nullptr ? echo->text + choice.text : choice.text;
    }
    one["logprobs"] = nullptr;
    if (form_.top_logprobs) {
      one["logprobs"] = form_.chat
                            ? ChatLogprobs(choice.tokens)
                            : CompletionLogprobs(i, choice.tokens, choice.prompt_scores, true);
    }
    one["finish_reason"] = FinishJson(choice.finished);
    if (form_.report_experts) one["winnow"] = Experts(choice.tokens);
    json["choices"].push_back(std::move(one));
  }
  json["usage"] = Usage();
  json["timings"] = Timings();
  json["winnow"] = {{"seed", form_.seed}};
  return json;
}

std::vector<OrderedJson> Answer::Chunks(const SequenceEvent& event) {
  Choice& choice = choices_[event.sequence];
  const char* object = form_.chat ? "chat.completion.chunk" : "text_completion";
  std::vector<OrderedJson> chunks;
  const bool first = !choice.begun;
  choice.begun = true;
  OrderedJson json = Frame(object);
  if (form_.include_usage) json["usage"] = nullptr;  // in all but the last chunk
  OrderedJson one = {{"index", event.sequence}};
  if (form_.chat) {
    if (first) {
      OrderedJson opening = json;
      opening["choices"].push_back({{"index", event.sequence},
                                    {"delta", {{"role", "assistant"}, {"content", ""}}},
                                    {"logprobs", nullptr},
                                    {"finish_reason", nullptr}});
      chunks.push_back(std::move(opening));
    }
    one["delta"] = OrderedJson::object();
    if (!event.text.empty()) one["delta"]["content"] = event.text;
  } else {
    const PromptText* echo = EchoOfChoice(event.sequence);
    one["text"] = first && echo != nullptr ? echo->text + event.text : event.text;
  }
  one["logprobs"] = nullptr;
  if (form_.top_logprobs && (first || !event.tokens.empty())) {
    one["logprobs"] =
        form_.chat ? ChatLogprobs(event.tokens)
                   : CompletionLogprobs(event.sequence, event.tokens, event.prompt_scores, first);
  }
  one["finish_reason"] = FinishJson(event.finished);
  if (form_.report_experts) one["winnow"] = Experts(event.tokens);
  json["choices"].push_back(std::move(one));
  if (event.finished) {
    choice.timings = event.timings;
    choice.finished = event.finished;
    const bool all = std::all_of(choices_.begin(), choices_.end(),
                                 [](const Choice& other) { return other.finished.has_value(); });
    if (all) {
      json["timings"] = Timings();
      json["winnow"] = {{"seed", form_.seed}};
    }
  }
  chunks.push_back(std::move(json));
  return chunks;
}

std::vector<OrderedJson> Answer::LastChunks() const {
  if (!form_.include_usage) return {};
  OrderedJson json = Frame(form_.chat ? "chat.completion.chunk" : "text_completion");
  json["usage"] = Usage();
  return {json};
}

}  // namespace winnow
