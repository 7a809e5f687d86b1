// The decoder of a tokenizer.json: tokens back to text. It works token by token, so that one
// implementation serves whole sequences and streams.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"  // Json
#include "tokenizer/matcher.h"
#include "tokenizer/regex.h"

namespace winnow::tok {

// Sequence, ByteLevel, ByteFallback, Fuse, Strip, Replace, Metaspace, BPEDecoder.
class Decoder {
 public:
  Decoder() = default;  // null: tokens joined with spaces
  // Throws ModelError naming `where` for anything else.
  static Decoder FromJson(const Json& json, const std::string& where);

 private:
  friend class DecodeRun;
  enum class Kind { kByteLevel, kByteFallback, kFuse, kStrip, kReplace, kMetaspace, kBpe };
  struct Step {
    Kind kind;
    std::string text;  // Strip: character; Replace: new text; Metaspace: mark; BPEDecoder: suffix
    Matcher matcher;   // Replace
    size_t start = 0;  // Strip
    size_t stop = 0;
    bool drops_first = false;  // Metaspace: the marks of the first token
  };

  void Add(const Json& json, const std::string& where);

  bool joins_with_spaces_ = true;
  std::vector<Step> steps_;
};

// One sequence of tokens on its way through a decoder. A piece of text is given out as soon as no
// later token can change it.
class DecodeRun {
 public:
  // With `streaming`, characters out of byte tokens (<0xNN>) are given out as soon as they are
  // complete; else, as the library does it, a run of byte tokens that is no valid UTF-8 as a whole
  // becomes U+FFFD for each of its bytes. The two differ only for such runs.
  DecodeRun(const Decoder& decoder, bool streaming);

  // Appends to `out` what is certain after one more token.
  void Put(std::string_view token, std::string& out);
  // Appends the rest. Nothing may follow.
  void Finish(std::string& out);

 private:
  struct State {
    bool is_fused = false;  // what comes in is parts of one token, not tokens
    bool is_first = true;
    std::string pending;
    size_t stripped = 0;  // Strip on a fused token: characters dropped so far
    bool strips = true;   // and whether more may be
  };

  // What step `index` does with a token, or with the next part of the one fused token.
  void Feed(size_t index, std::string_view token, std::string& out);
  void End(size_t index, std::string& out);

  void FeedByteLevel(size_t index, std::string_view token, std::string& out);
  void FeedByteFallback(size_t index, std::string_view token, std::string& out);
  void EndByteRun(size_t index, std::string& out);
  void FeedStrip(size_t index, std::string_view part, std::string& out);
  std::string Strip(size_t index, std::string_view token) const;
  std::string Replace(size_t index, std::string_view token);
  std::string ReplaceAll(std::string_view token, const std::string& from,
                         std::string_view to) const;

  const Decoder& decoder_;
  bool streaming_;
  std::vector<State> states_;  // one per step, and one for the joining at the end
  RegexScratch scratch_;
  size_t input_bytes_ = 0;  // of all tokens so far
};

}  // namespace winnow::tok
