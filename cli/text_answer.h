// A model and its tokenizer answering text prompts on standard output: what `run` does once and its
// interactive form again and again.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "generate/generator.h"   // Generator, GenerateOptions
#include "session.h"              // Session
#include "tokenizer/tokenizer.h"  // Tokenizer

namespace winnow::cli {

struct TextAnswer {
  std::string text;  // without the prompt, without a stop string
  GenerateResult result;
};

class TextAnswerer {
 public:
  // `capacity`: tokens of prompt and answer together. The memory is planned and required.
  TextAnswerer(Session& session, const Model& model, const Tokenizer& tokenizer, int64_t capacity,
               GenerateOptions options, std::vector<std::string> stops);

  // show(text) gets what can be shown as it comes, never half a character.
  TextAnswer Answer(std::span<const int32_t> prompt,
                    const std::function<void(const std::string&)>& show);

 private:
  const Tokenizer& tokenizer_;
  std::vector<std::string> stops_;
  std::unique_ptr<Generator> generator_;
};

// "12 prompt tokens at 310/s, 40 new at 31.2/s", with `details` also what was cached, experts and
// bytes of a token and the time to load.
std::string DescribeSpeed(size_t prompt_tokens, const GenerateResult& result, bool details);
OrderedJson SpeedJson(size_t prompt_tokens, const GenerateResult& result);

}  // namespace winnow::cli
