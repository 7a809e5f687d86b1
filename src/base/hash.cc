#include "base/hash.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <new>

namespace winnow {

struct Fingerprint::State {
  XXH3_state_t* xxh = XXH3_createState();
  State() {
    if (xxh == nullptr) throw std::bad_alloc();
    XXH3_128bits_reset(xxh);
  }
  ~State() { XXH3_freeState(xxh); }
  State(const State&) = delete;
  State& operator=(const State&) = delete;
};

Fingerprint::Fingerprint() : state_(std::make_unique<State>()) {}
Fingerprint::~Fingerprint() = default;

void Fingerprint::Add(std::span<const std::byte> bytes) {
  XXH3_128bits_update(state_->xxh, bytes.data(), bytes.size());
}

void Fingerprint::Add(std::string_view text) {
  Add(uint64_t{text.size()});
  Add(std::as_bytes(std::span(text)));
}

void Fingerprint::Add(uint64_t value) {
  XXH3_128bits_update(state_->xxh, &value, sizeof(value));
}

std::string Fingerprint::Hex() const {
  const XXH128_hash_t digest = XXH3_128bits_digest(state_->xxh);
  return fmt::format("{:016x}{:016x}", digest.high64, digest.low64);
}

}  // namespace winnow
