#include "forward/hidden_states.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"

namespace winnow {

HiddenStates::HiddenStates(int64_t num_tokens, int64_t hidden)
    : num_tokens_(num_tokens), hidden_(hidden), memory_(static_cast<size_t>(num_tokens * hidden)) {}

HiddenStates::HiddenStates(int64_t num_tokens, int64_t hidden, int64_t tile_tokens,
                           const fs::path& path)
    : num_tokens_(num_tokens),
      hidden_(hidden),
      memory_(static_cast<size_t>(std::min(tile_tokens, num_tokens) * hidden)),
      file_(File::Create(path)) {
  file_->Truncate(Bytes(num_tokens, hidden));
}

float* HiddenStates::Load(int64_t first, int64_t count) {
  if (!file_) return memory_.data() + first * hidden_;
  const std::span<float> tile = memory_.span().first(static_cast<size_t>(count * hidden_));
  file_->ReadAt(Bytes(first, hidden_), std::as_writable_bytes(tile));
  return memory_.data();
}

void HiddenStates::Store(int64_t first, int64_t count) {
  if (!file_) return;
  const std::span<float> tile = memory_.span().first(static_cast<size_t>(count * hidden_));
  file_->WriteAt(Bytes(first, hidden_), std::as_bytes(tile));
}

void HiddenStates::SaveTo(const fs::path& path) {
  const fs::path temporary = path.string() + ".tmp";
  {
    const File out = File::Create(temporary);
    if (file_) {
      out.CopyFrom(*file_, 0, 0, Bytes(num_tokens_, hidden_));
    } else {
      out.WriteAt(0, std::as_bytes(memory_.span()));
    }
    out.Sync();
  }
  RenameDurably(temporary, path);
}

void HiddenStates::LoadFrom(const fs::path& path) {
  const File in = File::OpenRead(path);
  if (in.size() != Bytes(num_tokens_, hidden_)) {
    throw ModelError(fmt::format("{}: {} bytes, expected {}", path.string(), in.size(),
                                 Bytes(num_tokens_, hidden_)),
                     "the unfinished run is damaged; start again with --force");
  }
  if (file_) {
    file_->CopyFrom(in, 0, 0, in.size());
  } else {
    in.ReadAt(0, std::as_writable_bytes(memory_.span()));
  }
}

}  // namespace winnow
