// The endpoints without HTTP: bodies in, JSON out. Turns a checked request into sequences for the
// scheduler and says in what form the answer is wanted. Used by several connection threads at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"            // OrderedJson
#include "serve/answer.h"         // Answer
#include "serve/generation.h"     // Generation
#include "serve/request.h"        // GenerationSettings
#include "serve/scheduler.h"      // Scheduler
#include "tokenizer/tokenizer.h"  // Tokenizer

namespace winnow {

// messages, template variables -> the prompt's text. Throws for messages it cannot render.
using ChatRenderer = std::function<std::string(
    const OrderedJson& messages, bool add_generation_prompt, const OrderedJson& variables)>;

// What is served, as clients see it.
struct ServedModel {
  std::string name;
  int64_t created = 0;  // Unix seconds
  int64_t slots = 0;
  std::vector<int32_t> moe_layers = {};   // decoder indices
  std::vector<int64_t> num_experts = {};  // of those
  int64_t experts_per_token = 0;
  ChatRenderer render_chat = {};       // empty: the model has no chat template
  double default_timeout_seconds = 0;  // 0: none
};

class ApiService {
 public:
  // A request on its way.
  struct Job {
    std::shared_ptr<Generation> generation;
    Answer answer;
    bool stream = false;
  };

  // All must outlive it.
  ApiService(ServedModel model, const Tokenizer& tokenizer, Scheduler& scheduler);

  Job StartCompletion(std::string_view body);
  Job StartChat(std::string_view body);
  // `reserve` is told, before anything is made of the text, how many bytes the answer may take for
  // each of the text's and for how many; it may throw.
  using ReserveMemory = std::function<void(uint64_t bytes_for_each, uint64_t text_bytes)>;
  OrderedJson Tokenize(std::string_view body, const ReserveMemory& reserve) const;
  OrderedJson Detokenize(std::string_view body) const;
  OrderedJson Models() const;
  OrderedJson Properties() const;

 private:
  Job Start(const std::vector<PromptText>& prompts, const GenerationSettings& settings,
            bool score_prompts, AnswerForm form);
  void RequireModel(const std::string& name) const;
  AnswerForm NewForm(const GenerationSettings& settings, bool chat);

  const ServedModel model_;
  const Tokenizer& tokenizer_;
  Scheduler& scheduler_;
  std::atomic<uint64_t> requests_{0};
};

}  // namespace winnow
