#include "serve/running_sequence.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "forward/expert_skipping.h"

namespace winnow {

int64_t CountCharacters(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

RunningSequence::RunningSequence(std::shared_ptr<Generation> generation, size_t index, int64_t slot,
                                 const Tokenizer& tokenizer, const VocabularyRules& rules)
    : generation_(std::move(generation)),
      index_(index),
      slot_(slot),
      rules_(rules),
      decoder_(tokenizer, true),
      matcher_(spec().stop),
      history_(spec().prompt),
      random_state_(spec().sampling.seed) {
  timings_.prompt_tokens = static_cast<int64_t>(spec().prompt.size());
}

void RunningSequence::FinishPrompt(std::vector<PositionScore> scores) {
  prompt_finished_ = true;
  const bool ends = spec().max_tokens == 0;
  if (scores.empty() && !ends) return;
  SequenceEvent event;
  event.sequence = index_;
  event.prompt_scores = std::move(scores);
  if (ends) {
    finished_ = true;
    event.finished = FinishReason::kLength;
    event.timings = timings_;
  }
  generation_->Put(std::move(event));
}

void RunningSequence::Accept(std::span<const float> logits, TokenExperts experts) {
  std::span<const float> drawn_from = logits;
  if (!spec().rules.empty()) {
    changed_logits_.assign(logits.begin(), logits.end());
    ApplyLogitRules(spec().rules, history_, spec().sampling.temperature, changed_logits_);
    drawn_from = changed_logits_;
  }
  const int32_t token =
      DrawToken(drawn_from, rules_.vocabulary_limit, spec().sampling, random_state_);
  GeneratedToken generated{token, decoded_characters_, {}, std::move(experts)};
  if (spec().top_logprobs) generated.score = ScorePosition(logits, token, *spec().top_logprobs);
  history_.Add(token);
  next_token_ = token;
  ++timings_.generated_tokens;
  experts_run_ += std::count_if(generated.experts.begin(), generated.experts.end(),
                                [](int32_t id) { return !IsSkipped(id); });
  pending_.push_back(std::move(generated));

  const auto& eos = rules_.eos_token_ids;
  const bool ends = spec().stop_at_eos && std::find(eos.begin(), eos.end(), token) != eos.end();
  const bool full = timings_.generated_tokens >= spec().max_tokens;
  std::string piece = ends ? std::string() : decoder_.Put(token);
  if (ends || full) piece += decoder_.Finish();
  decoded_characters_ += CountCharacters(piece);
  std::string text = matcher_.Put(piece);
  if (matcher_.stopped() || ends) {
    text += matcher_.Finish();
    Show(text, FinishReason::kStop);
  } else if (full) {
    text += matcher_.Finish();
    Show(text, FinishReason::kLength);
  } else if (!text.empty()) {
    Show(text, {});
  }
}

void RunningSequence::Show(const std::string& text, std::optional<FinishReason> reason) {
  shown_characters_ += CountCharacters(text);
  SequenceEvent event;
  event.sequence = index_;
  event.text = text;
  // Tokens that lie wholly behind a stop string are not part of the answer.
  for (GeneratedToken& token : pending_) {
    if (matcher_.stopped() && token.text_offset >= shown_characters_ && token.text_offset > 0) {
      continue;
    }
    event.tokens.push_back(std::move(token));
  }
  pending_.clear();
  event.finished = reason;
  if (reason) {
    finished_ = true;
    const auto steps = static_cast<double>(timings_.generated_tokens * rules_.moe_layers);
    timings_.experts_per_token = steps > 0 ? static_cast<double>(experts_run_) / steps : 0;
    event.timings = timings_;
  }
  generation_->Put(std::move(event));
}

}  // namespace winnow
