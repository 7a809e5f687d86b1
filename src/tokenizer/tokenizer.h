// Text <-> token ids from a Hugging Face tokenizer.json (and the tokenizer_config.json beside it).
// BPE with byte fallback or byte level; normalizers, pre-tokenizers, added tokens, post-processors,
// decoders as the `tokenizers` library applies them. Throws ModelError for a file it cannot honour
// exactly (unknown component, merge of unknown tokens, pattern that does not compile, ...).
// Immutable after loading; Encode and Decode may be called from several threads.
//
// The file's `truncation` and `padding` are ignored: they are settings of a call, which would cut
// documents silently. Text that is no valid UTF-8 is encoded as if each ill-formed part were
// U+FFFD. Added tokens whose stated id is not the one the library would give are refused.
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
  // Upper bound of what loading `path` holds, from the file's size; 0 if there is no such file.
  static uint64_t EstimateBytes(const fs::path& path);
  // From the files' contents; `tokenizer_config_json` may be empty. Messages start with `where`.
  static Tokenizer FromJson(std::string_view tokenizer_json, std::string_view tokenizer_config_json,
                            const std::string& where);
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
// character), Finish the rest. Concatenated they equal Decode of all ids; only byte tokens (<0xNN>)
// that do not form valid UTF-8 may give other replacement characters, because Decode judges a whole
// run of them by its end. Must not outlive the tokenizer's contents (moving the Tokenizer is fine).
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens);
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;
  ~StreamDecoder();
  std::string Put(int32_t id);
  std::string Finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace winnow
