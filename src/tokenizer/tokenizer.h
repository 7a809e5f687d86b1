// Text <-> token ids from a Hugging Face tokenizer.json (and the tokenizer_config.json beside it).
// BPE with byte fallback or byte level; normalizers, pre-tokenizers, added tokens, post-processors,
// decoders as the `tokenizers` library applies them. Throws ModelError for a file it cannot honour
// exactly (unknown component, merge of unknown tokens, pattern that does not compile, ...).
// Immutable after loading; Encode and Decode may be called from several threads.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"  // fs

namespace winnow {

class Tokenizer {
 public:
  // `path` is a folder with tokenizer.json or the file itself; a tokenizer_config.json beside it
  // decides on BOS and EOS for Llama-class tokenizers (add_bos_token, add_eos_token).
  static Tokenizer Load(const fs::path& path);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Added tokens in the text are recognised as such. `add_special_tokens` runs the post-processor.
  std::vector<int32_t> Encode(std::string_view text, bool add_special_tokens) const;
  // Ids without a token are skipped, as in the library.
  std::string Decode(std::span<const int32_t> ids, bool skip_special_tokens) const;

  std::optional<int32_t> TokenToId(std::string_view token) const;
  // The token as stored ("Ġthe"), empty for an unused id.
  std::string IdToToken(int32_t id) const;
  // One more than the largest id.
  int32_t vocab_size() const;
  // From tokenizer_config.json (bos_token, eos_token), nothing if absent or null.
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  // True if Encode(..., true) puts bos_id() first.
  bool adds_bos() const;

  struct Impl;  // shared with StreamDecoder

 private:
  explicit Tokenizer(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
  friend class StreamDecoder;
};

// Decodes a growing sequence: Put returns the text that can be shown after each id (never half a
// character), Finish the rest. Concatenated they equal Decode of all ids. Must not outlive the
// tokenizer.
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens);
  std::string Put(int32_t id);
  std::string Finish();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_tokens_;
  std::vector<int32_t> ids_;  // since the last point where decoding could restart
  std::string shown_;         // what of their text has been returned
};

}  // namespace winnow
