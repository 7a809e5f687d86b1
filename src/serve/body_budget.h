// What the bodies of requests may take at once, while they are read and parsed. The server counts
// each byte as it comes, as what it may become, and refuses a body there is no room for; the verb
// `serve` puts the total into its memory plan.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace winnow {

// JSON values a body may have: 256 prompts of 5,120 token ids.
inline constexpr size_t kMaxBodyValues = size_t{5} << 18;

// Of a body's text: what it may have doubled its room for, in the values, in the request.
inline constexpr uint64_t kTextCopies = 4;

// The most that a body of so many bytes takes: its text, which may have doubled its room, its
// strings once more in the values and once in the request, and 96 bytes for each value. That is an
// empty string: 16 bytes in an array, which takes three times its values while it doubles, and 48
// for the string. A value has 3 bytes with its comma, or 2 and takes half of it.
constexpr uint64_t BodyMemoryBytes(uint64_t body_bytes) {
  constexpr uint64_t kValueBytes = 96;
  return kTextCopies * body_bytes +
         std::min(kValueBytes / 3 * body_bytes, kValueBytes * kMaxBodyValues);
}

// The largest body, up to `most` bytes, that takes `memory_bytes` at most.
constexpr size_t LargestBodyWithin(uint64_t memory_bytes, size_t most) {
  if (BodyMemoryBytes(most) <= memory_bytes) return most;
  size_t fits = 0;
  for (size_t beyond = most; beyond - fits > 1;) {
    const size_t middle = fits + (beyond - fits) / 2;
    (BodyMemoryBytes(middle) <= memory_bytes ? fits : beyond) = middle;
  }
  return fits;
}

// Shared by all connections.
class BodyBudget {
 public:
  explicit BodyBudget(uint64_t bytes) : free_bytes_(bytes) {}
  bool Take(uint64_t bytes) {
    uint64_t left = free_bytes_;
    do {
      if (left < bytes) return false;
    } while (!free_bytes_.compare_exchange_weak(left, left - bytes));
    return true;
  }
  void Give(uint64_t bytes) { free_bytes_ += bytes; }

 private:
  std::atomic<uint64_t> free_bytes_;
};

// One body and its share of the budget.
class HeldBody {
 public:
  explicit HeldBody(BodyBudget& budget) : budget_(budget) {}
  HeldBody(const HeldBody&) = delete;
  HeldBody& operator=(const HeldBody&) = delete;
  ~HeldBody() { Release(); }
  // False, and nothing changed, if the budget has no room for it.
  bool Append(std::string_view piece) {
    const uint64_t more =
        BodyMemoryBytes(text_.size() + piece.size()) - BodyMemoryBytes(text_.size());
    if (!budget_.Take(more)) return false;
    text_.append(piece);
    return true;
  }
  // What is made of it once it is parsed takes so many bytes, those of its values included, which
  // are gone then. False, and nothing changed, as above.
  bool Reserve(uint64_t bytes) {
    // Of what BodyMemoryBytes counts, what is not text.
    const uint64_t values = BodyMemoryBytes(text_.size()) - kTextCopies * text_.size();
    const uint64_t more = bytes - std::min(bytes, values);
    if (!budget_.Take(more)) return false;
    reserved_bytes_ += more;
    return true;
  }
  // Once it has been parsed, and what else was reserved is gone.
  void Release() {
    budget_.Give(BodyMemoryBytes(text_.size()) + reserved_bytes_);
    text_ = std::string();
    reserved_bytes_ = 0;
  }
  const std::string& text() const { return text_; }

 private:
  BodyBudget& budget_;
  std::string text_;
  uint64_t reserved_bytes_ = 0;
};

}  // namespace winnow
