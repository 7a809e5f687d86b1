#include "text_answer.h"

#include <fmt/format.h>

#include <algorithm>

#include "generate/stop_matcher.h"

namespace winnow::cli {

TextAnswerer::TextAnswerer(Session& session, const Model& model, const Tokenizer& tokenizer,
                           int64_t capacity, GenerateOptions options,
                           std::vector<std::string> stops)
    : tokenizer_(tokenizer), stops_(std::move(stops)) {
  options.vocabulary_limit = tokenizer.vocab_size();
  const GeneratePlan plan = PlanGenerate(model, capacity, options, session.pool().num_threads());
  session.RequireMemory(plan.memory, "run");
  if (!plan.resident)
    session.Note("the model does not fit the budget: layers are read again for every token");
  generator_ = std::make_unique<Generator>(model, capacity, std::move(options), plan,
                                           session.pool(), session.control());
}

TextAnswer TextAnswerer::Answer(std::span<const int32_t> prompt,
                                const std::function<void(const std::string&)>& show) {
  // The prompt is decoded too, so that the continuation joins it as the tokenizer would write it.
  StreamDecoder decoder(tokenizer_, true);
  for (const int32_t id : prompt) decoder.Put(id);
  StopMatcher stops(stops_);
  TextAnswer answer;
  const auto put = [&](const std::string& piece) {
    answer.text += piece;
    if (!piece.empty()) show(piece);
  };
  answer.result = generator_->Run(prompt, [&](int32_t token) {
    put(stops.Put(decoder.Put(token)));
    return !stops.stopped();
  });
  put(stops.Put(decoder.Finish()));
  put(stops.Finish());
  return answer;
}

std::string DescribeSpeed(size_t prompt_tokens, const GenerateResult& result, bool details) {
  const double read =
      static_cast<double>(prompt_tokens) - static_cast<double>(result.cached_tokens);
  std::string text = fmt::format(
      "{} prompt tokens at {:.0f}/s, {} new at {:.1f}/s", prompt_tokens,
      read / std::max(1e-9, result.prompt_seconds), result.tokens.size(),
      static_cast<double>(result.decoded_tokens) / std::max(1e-9, result.decode_seconds));
  if (!details) return text;
  if (result.cached_tokens > 0)
    text += fmt::format("; {} of the prompt kept", result.cached_tokens);
  if (result.decoded_tokens > 0 && result.bytes_per_token > 0) {
    text += fmt::format("; {:.2f} experts a MoE layer and {:.3f} GB of weights a token",
                        result.experts_per_token, result.bytes_per_token * 1e-9);
  }
  return text + fmt::format("; loaded in {:.1f} s", result.load_seconds);
}

OrderedJson SpeedJson(size_t prompt_tokens, const GenerateResult& result) {
  return {{"prompt_tokens", prompt_tokens},
          {"cached_tokens", result.cached_tokens},
          {"decoded_tokens", result.decoded_tokens},
          {"load_seconds", result.load_seconds},
          {"prompt_seconds", result.prompt_seconds},
          {"decode_seconds", result.decode_seconds},
          {"experts_per_token", result.experts_per_token},
          {"bytes_per_token", result.bytes_per_token}};
}

}  // namespace winnow::cli
