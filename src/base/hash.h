// 128-bit fingerprints (XXH3): they tell whether two inputs are the same, not who made them.
// Used to refuse resuming with a changed model, text or flag and to key statistics and plans.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace winnow {

class Fingerprint {
 public:
  Fingerprint();
  ~Fingerprint();
  Fingerprint(const Fingerprint&) = delete;
  Fingerprint& operator=(const Fingerprint&) = delete;
  void Add(std::span<const std::byte> bytes);
  // Adds the length too, so that ("ab","c") and ("a","bc") differ.
  void Add(std::string_view text);
  void Add(uint64_t value);
  // 32 lower-case hex digits.
  std::string Hex() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace winnow
