#include "eval/tasks.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string_view>

#include "base/error.h"

namespace winnow {
namespace {

// Bytes of the white space that `text` ends in. White space is what Python's str.rstrip() takes,
// which the published harness uses: Unicode's and the four ASCII separators.
size_t TrailingSpaceBytes(std::string_view text) {
  static constexpr std::string_view kTwoBytes[] = {"\xc2\x85", "\xc2\xa0"};
  static constexpr std::string_view kThreeBytes[] = {"\xe1\x9a\x80", "\xe2\x80\xa8",
                                                     "\xe2\x80\xa9", "\xe2\x80\xaf",
                                                     "\xe2\x81\x9f", "\xe3\x80\x80"};
  const size_t size = text.size();
  while (!text.empty()) {
    const auto last = static_cast<unsigned char>(text.back());
    const auto ends_in = [&](std::string_view space) { return text.ends_with(space); };
    size_t bytes = 0;
    if (last == ' ' || (last >= 0x09 && last <= 0x0d) || (last >= 0x1c && last <= 0x1f)) {
      bytes = 1;
    } else if (std::ranges::any_of(kTwoBytes, ends_in)) {
      bytes = 2;
    } else if (std::ranges::any_of(kThreeBytes, ends_in) ||
               // U+2000 to U+200A
               (last >= 0x80 && last <= 0x8a && text.size() >= 3 &&
                text.substr(text.size() - 3, 2) == "\xe2\x80")) {
      bytes = 3;
    }
    if (bytes == 0) break;
    text.remove_suffix(bytes);
  }
  return size - text.size();
}

struct EncodedRequest {
  std::vector<int32_t> ids;  // context and continuation
  size_t context = 0;        // how many of them are context
};

class RequestEncoder {
 public:
  RequestEncoder(const Tokenizer& tokenizer, const RequestEncoding& encoding)
      : tokenizer_(tokenizer), encoding_(encoding) {}

  EncodedRequest Encode(const TaskItem& item, size_t index) {
    const TaskRequest& request = item.requests[index];
    const size_t spaces = TrailingSpaceBytes(request.context);
    const std::string context = request.context.substr(0, request.context.size() - spaces);
    EncodedRequest encoded;
    if (context.empty()) {
      encoded = EncodeAlone(item, request.context + request.continuation);
    } else {
      const std::vector<int32_t> whole =
          tokenizer_.Encode(request.context + request.continuation, encoding_.special_tokens);
      if (context != context_ || context_ids_.empty()) {  // choices of an item share theirs
        context_ids_ = tokenizer_.Encode(context, encoding_.special_tokens);
        context_ = context;
      }
      // The context keeps its own ids even where the whole's first ids are others.
      encoded.ids = context_ids_;
      encoded.context = context_ids_.size();
      if (whole.size() > encoded.context) {
        encoded.ids.insert(encoded.ids.end(), whole.begin() + static_cast<int64_t>(encoded.context),
                           whole.end());
      }
    }
    if (encoded.ids.size() <= encoded.context) {
      throw UsageError(fmt::format("{}: choice {} adds no token to its context", item.where, index),
                       "the tokenizer merges it into the text before it: it cannot be scored");
    }
    Truncate(item, index, encoded);
    return encoded;
  }
  int64_t truncated() const { return truncated_; }

 private:
  EncodedRequest EncodeAlone(const TaskItem& item, const std::string& text) const {
    if (!encoding_.prefix) {
      throw UsageError(
          fmt::format("{}: the context is empty, and the tokenizer has neither BOS nor EOS to "
                      "stand for it",
                      item.where),
          "remove the item, or give it a context");
    }
    EncodedRequest encoded;
    encoded.ids = tokenizer_.Encode(text, encoding_.special_tokens);
    if (encoded.ids.empty() || encoded.ids.front() != *encoding_.prefix) {
      encoded.ids.insert(encoded.ids.begin(), *encoding_.prefix);
    }
    encoded.context = 1;
    return encoded;
  }
  void Truncate(const TaskItem& item, size_t index, EncodedRequest& encoded) {
    const auto limit = static_cast<size_t>(encoding_.max_tokens);
    if (limit == 0 || encoded.ids.size() <= limit) return;
    const size_t excess = encoded.ids.size() - limit;
    if (excess >= encoded.context) {
      throw UsageError(
          fmt::format("{}: choice {} has {} tokens, and context and choice may have {} together",
                      item.where, index, encoded.ids.size() - encoded.context, limit),
          "raise --max-length if the model's context allows it, or remove the item");
    }
    encoded.ids.erase(encoded.ids.begin(), encoded.ids.begin() + static_cast<int64_t>(excess));
    encoded.context -= excess;
    ++truncated_;
  }

  const Tokenizer& tokenizer_;
  const RequestEncoding& encoding_;
  std::string context_;
  std::vector<int32_t> context_ids_;  // of context_
  int64_t truncated_ = 0;
};

// What the model reads: the last token is only predicted.
std::span<const int32_t> Fed(const EncodedRequest& request) {
  return std::span(request.ids).first(request.ids.size() - 1);
}

std::span<const int32_t> LastSequence(const TokenSet& inputs) {
  if (inputs.num_sequences() == 0) return {};
  const auto begin = static_cast<size_t>(*(inputs.offsets.end() - 2));
  return std::span(inputs.ids).subspan(begin);
}

}  // namespace

TaskRequests EncodeRequests(std::span<const TaskItem> items, const Tokenizer& tokenizer,
                            const RequestEncoding& encoding) {
  RequestEncoder encoder(tokenizer, encoding);
  TaskRequests requests;
  for (const TaskItem& item : items) {
    for (size_t i = 0; i < item.requests.size(); ++i) {
      const EncodedRequest request = encoder.Encode(item, i);
      if (!std::ranges::equal(Fed(request), LastSequence(requests.inputs))) {
        requests.inputs.Append(Fed(request));
      }
      const int64_t begin = *(requests.inputs.offsets.end() - 2);
      for (size_t t = request.context; t < request.ids.size(); ++t) {
        requests.targets.push_back({begin + static_cast<int64_t>(t) - 1, request.ids[t]});
      }
      requests.target_offsets.push_back(requests.targets.size());
    }
    requests.request_offsets.push_back(requests.target_offsets.size() - 1);
  }
  requests.truncated = encoder.truncated();
  return requests;
}

EvalPlan PlanTasks(const Model& model, std::span<const TaskItem> items,
                   const TaskRequests& requests, const EvalOptions& options, int num_threads) {
  uint64_t bookkeeping = requests.targets.size() * (sizeof(TokenTarget) + kTargetScoreBytes) +
                         requests.target_offsets.size() * (sizeof(size_t) + sizeof(RequestScore));
  for (const TaskItem& item : items) {
    bookkeeping += sizeof(TaskItem) + item.where.size() + item.task.size();
    for (const TaskRequest& request : item.requests) {
      bookkeeping += sizeof(TaskRequest) + request.context.size() + request.continuation.size() +
                     2 * sizeof(int64_t);
    }
  }
  return PlanEval(model, requests.inputs, bookkeeping, options, num_threads);
}

TaskScores RunTasks(const Model& model, std::span<const TaskItem> items,
                    const TaskRequests& requests, const EvalOptions& options, const EvalPlan& plan,
                    ThreadPool& pool, const JobControl& control) {
  RequireIdsInVocabulary(model, requests.inputs.ids);
  for (const TokenTarget& target : requests.targets) {
    RequireIdsInVocabulary(model, std::span(&target.id, 1));
  }
  SweptStates swept = SweepLayers(model, requests.inputs, options, plan, pool, control);
  const std::vector<TokenScore> tokens =
      ScoreTargets(model, requests.inputs, requests.targets, *swept.states, pool, control);
  TaskScores scores;
  scores.skipping = std::move(swept.skipping);
  for (size_t item = 0; item + 1 < requests.request_offsets.size(); ++item) {
    std::vector<RequestScore>& of_item = scores.items.emplace_back();
    for (size_t r = requests.request_offsets[item]; r < requests.request_offsets[item + 1]; ++r) {
      RequestScore score{.is_greedy = true};
      for (size_t t = requests.target_offsets[r]; t < requests.target_offsets[r + 1]; ++t) {
        score.log_likelihood += tokens[t].log_likelihood;
        score.is_greedy = score.is_greedy && tokens[t].is_greedy;
        ++score.tokens;
      }
      if (!std::isfinite(score.log_likelihood)) {
        throw ModelError(fmt::format("the model's logits are not finite ({})", items[item].where),
                         "the weights may hold NaN or Inf: see winnow doctor MODEL");
      }
      of_item.push_back(score);
    }
  }
  return scores;
}

}  // namespace winnow
