// A model made of arithmetic, for tests: logits are hashes of all tokens of the sequence, so that
// any mistake in what a slot holds changes them. A token that Decode added hashes differently from
// one that Prefill added, as BatchRunner's kernels differ in the last bits.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "forward/expert_skipping.h"
#include "serve/sequence_runner.h"

namespace winnow {

class FakeRunner : public SequenceRunner {
 public:
  struct Options {
    int64_t slots = 2;
    int64_t context_tokens = 64;
    int64_t vocab_size = 32;
    int64_t moe_layers = 2, experts_per_token = 2;
    // If set, the token that becomes by far the likeliest after `last`.
    std::function<std::optional<int32_t>(int32_t last)> favourite = {};
    // Called at the start of every call; may throw or wait.
    std::function<void()> before_call = {};
  };
  explicit FakeRunner(Options options)
      : options_(std::move(options)), held_(static_cast<size_t>(options_.slots)) {}

  int64_t slots() const override { return options_.slots; }
  int64_t context_tokens() const override { return options_.context_tokens; }
  int64_t vocab_size() const override { return options_.vocab_size; }

  void Truncate(int64_t slot, int64_t length) override {
    auto& held = held_.at(static_cast<size_t>(slot));
    if (length < 0 || static_cast<size_t>(length) > held.size()) {
      throw std::logic_error("truncated to more than the slot holds");
    }
    held.resize(static_cast<size_t>(length));
  }

  void CopyPrefix(int64_t from, int64_t to, int64_t length) override {
    const auto& source = held_.at(static_cast<size_t>(from));
    if (static_cast<size_t>(length) > source.size()) throw std::logic_error("copied too much");
    held_.at(static_cast<size_t>(to)).assign(source.begin(), source.begin() + length);
  }

  void Prefill(int64_t slot, std::span<const int32_t> ids, int64_t wanted,
               const LogitsSink& on_logits) override {
    Start();
    if (ids.empty() || wanted < 0 || wanted > static_cast<int64_t>(ids.size())) {
      throw std::logic_error("Prefill of nothing, or more logits than tokens");
    }
    prefilled_tokens_ += static_cast<int64_t>(ids.size());
    std::vector<float> logits(static_cast<size_t>(options_.vocab_size));
    for (size_t i = 0; i < ids.size(); ++i) {
      Append(slot, ids[i], 0);
      if (static_cast<int64_t>(i + static_cast<size_t>(wanted)) >=
          static_cast<int64_t>(ids.size())) {
        Fill(slot, logits);
        on_logits(static_cast<int64_t>(i), logits);
      }
    }
  }

  void Decode(std::span<const DecodeEntry> entries, std::span<float> logits) override {
    Start();
    if (entries.empty()) throw std::logic_error("Decode of nothing");
    ++decode_calls_;
    const auto v = static_cast<size_t>(options_.vocab_size);
    for (size_t i = 0; i < entries.size(); ++i) {
      Append(entries[i].slot, entries[i].token, 1);
      Fill(entries[i].slot, logits.subspan(i * v, v));
    }
  }

  const ExpertUse& last_experts() const override { return experts_; }
  int64_t prefilled_tokens() const { return prefilled_tokens_; }
  int64_t decode_calls() const { return decode_calls_; }

 private:
  struct Held {
    int32_t token;
    uint64_t state;
  };

  static uint64_t Mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

  void Start() {
    if (options_.before_call) options_.before_call();
    experts_ = {options_.moe_layers, options_.experts_per_token, {}};
  }

  void Append(int64_t slot, int32_t token, uint64_t by_decode) {
    auto& held = held_.at(static_cast<size_t>(slot));
    if (static_cast<int64_t>(held.size()) >= options_.context_tokens) {
      throw std::logic_error("the slot has no room");
    }
    const uint64_t before = held.empty() ? 1 : held.back().state;
    held.push_back({token, Mix(before * 31 + static_cast<uint64_t>(token) * 2 + by_decode + 7)});
    for (int64_t layer = 0; layer < options_.moe_layers; ++layer) {
      for (int64_t rank = 0; rank < options_.experts_per_token; ++rank) {
        // The last rank is skipped for odd tokens.
        const bool skipped = rank > 0 && rank + 1 == options_.experts_per_token && token % 2 != 0;
        const auto expert = static_cast<int32_t>((token + layer + rank) % 8);
        experts_.ids.push_back(skipped ? SkippedSlot(expert) : expert);
      }
    }
  }

  void Fill(int64_t slot, std::span<float> logits) const {
    const Held& last = held_.at(static_cast<size_t>(slot)).back();
    for (size_t i = 0; i < logits.size(); ++i) {
      logits[i] = static_cast<float>(Mix(last.state + i * 977) >> 40) * 0x1p-22f;  // 0 to 4
    }
    if (!options_.favourite) return;
    if (const auto id = options_.favourite(last.token)) logits[static_cast<size_t>(*id)] += 50;
  }

  Options options_;
  std::vector<std::vector<Held>> held_;
  ExpertUse experts_;
  int64_t prefilled_tokens_ = 0, decode_calls_ = 0;
};

}  // namespace winnow
