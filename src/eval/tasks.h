// Log-likelihoods of task items: multiple choice and targets, requests cut into tokens as
// lm-evaluation-harness cuts them for a server that is sent token ids (its `local-completions` with
// a Hugging Face tokenizer), so that both find the same numbers. Called by `winnow eval tasks`.
// Layer-major: the requests of all items go through a layer together.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "eval/eval_sweep.h"      // EvalOptions, EvalPlan, TokenTarget
#include "eval/task_items.h"      // TaskItem
#include "tokenizer/tokenizer.h"  // Tokenizer

namespace winnow {

struct RequestEncoding {
  // Stands where the context is empty: the tokenizer's BOS, else its EOS.
  std::optional<int32_t> prefix;
  // Encode with the tokenizer's post-processor (BOS). lm-evaluation-harness does so for this kind
  // of model with add_bos_token=True, and for its own `hf` models.
  bool special_tokens = false;
  // The largest number of tokens of context and continuation together; 0: any. More are cut from
  // the left. lm-evaluation-harness allows one less than its max_length.
  int64_t max_tokens = 0;
};

// What is fed and what is scored. A request whose tokens but the last are those of the one before
// (answers of one token) shares its sequence.
struct TaskRequests {
  TokenSet inputs;
  std::vector<TokenTarget> targets;           // continuations, request by request
  std::vector<size_t> target_offsets = {0};   // [requests + 1] into targets
  std::vector<size_t> request_offsets = {0};  // [items + 1] into requests
  int64_t truncated = 0;                      // requests cut from the left
};

// The context's trailing white space becomes part of the continuation. Fed are the ids of the
// context encoded alone, then those of both encoded together beyond as many: where a token of the
// whole reaches across the boundary, the context keeps its own. UsageError for a
// continuation that adds no token or leaves no room for one of context, and for an empty context if
// there is no prefix.
TaskRequests EncodeRequests(std::span<const TaskItem> items, const Tokenizer& tokenizer,
                            const RequestEncoding& encoding);

struct RequestScore {
  double log_likelihood = 0;  // of the continuation: sum over its tokens, natural log
  int64_t tokens = 0;
  bool is_greedy = false;  // each token is the likeliest at its place
  bool operator==(const RequestScore&) const = default;
};
struct TaskScores {
  std::vector<std::vector<RequestScore>> items;  // [items][requests]
  std::optional<SkipCounts> skipping;            // of all positions, if experts were skipped
};

EvalPlan PlanTasks(const Model& model, std::span<const TaskItem> items,
                   const TaskRequests& requests, const EvalOptions& options, int num_threads);
// ModelError, naming the item, if the model's logits are not finite; UsageError for ids outside its
// vocabulary.
TaskScores RunTasks(const Model& model, std::span<const TaskItem> items,
                    const TaskRequests& requests, const EvalOptions& options, const EvalPlan& plan,
                    ThreadPool& pool, const JobControl& control);

}  // namespace winnow
