// One sequence in a slot: draws its tokens, turns them into text, knows when it ends, and sends
// what it yields to the client's Generation. The scheduler drives it from one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "generate/stop_matcher.h"  // StopMatcher
#include "serve/generation.h"       // Generation, SequenceSpec
#include "tokenizer/tokenizer.h"    // Tokenizer, StreamDecoder

namespace winnow {

// What ends and bounds sequences of a model.
struct VocabularyRules {
  std::vector<int32_t> eos_token_ids;
  int64_t vocabulary_limit = 0;  // ids from here on are never drawn; 0: none
  int64_t moe_layers = 0;
};

class RunningSequence {
 public:
  RunningSequence(std::shared_ptr<Generation> generation, size_t index, int64_t slot,
                  const Tokenizer& tokenizer, const VocabularyRules& rules);

  const SequenceSpec& spec() const { return generation_->specs()[index_]; }
  Generation& generation() { return *generation_; }
  int64_t slot() const { return slot_; }
  SequenceTimings& timings() { return timings_; }

  // The prompt is through the model; `scores` if they were asked for.
  void FinishPrompt(std::vector<PositionScore> scores);
  // Draws the next token from logits [V]. ModelError if they are not finite.
  void Accept(std::span<const float> logits, TokenExperts experts);
  bool finished() const { return finished_; }
  bool decoding() const { return prompt_finished_ && !finished_; }
  // The token to give to the model next, if decoding().
  int32_t next_token() const { return next_token_; }

  bool started = false;  // its slot was prepared

 private:
  void Show(const std::string& text, std::optional<FinishReason> reason);

  const std::shared_ptr<Generation> generation_;
  const size_t index_;
  const int64_t slot_;
  const VocabularyRules& rules_;
  StreamDecoder decoder_;
  StopMatcher matcher_;
  TokenHistory history_;
  uint64_t random_state_;
  std::vector<float> changed_logits_;
  std::vector<GeneratedToken> pending_;
  int64_t decoded_characters_ = 0, shown_characters_ = 0;
  int64_t experts_run_ = 0;
  int32_t next_token_ = 0;
  bool prompt_finished_ = false, finished_ = false;
  SequenceTimings timings_;
};

// Characters (code points) of UTF-8 text.
int64_t CountCharacters(std::string_view text);

}  // namespace winnow
