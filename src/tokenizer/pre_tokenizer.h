// The pre-tokenizer of a tokenizer.json: cuts normalized text into the pieces the model encodes one
// by one. Nested sequences are one list of stages; every stage runs on every piece so far.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"  // Json
#include "tokenizer/function_ref.h"
#include "tokenizer/matcher.h"
#include "tokenizer/regex.h"

namespace winnow::tok {

struct Piece {
  std::string_view text;
  size_t origin_bytes = 0;  // as in Text (normalizer.h)
};
// The part of a piece.
Piece CutPiece(Piece piece, Span span);

// How Metaspace puts its mark before a text: always, only at the start of the input, never.
enum class PrependScheme { kFirst, kAlways, kNever };

struct MetaspaceOptions {
  std::string replacement;  // one character
  PrependScheme prepend = PrependScheme::kAlways;
  bool split = true;
};
// Shared by the pre-tokenizer and the decoder of that name.
MetaspaceOptions ParseMetaspace(const Json& json, const std::string& where);

// Sequence, Split, ByteLevel, Metaspace, Digits, Whitespace, WhitespaceSplit, Punctuation,
// BertPreTokenizer, CharDelimiterSplit.
class PreTokenizer {
 public:
  PreTokenizer() = default;  // null: one piece
  // Throws ModelError naming `where` for anything else.
  static PreTokenizer FromJson(const Json& json, const std::string& where);

  size_t num_stages() const { return stages_.size(); }
  // Whether this stage cuts (rather than rewrites) pieces.
  bool Cuts(size_t stage) const { return stages_[stage].kind == StageKind::kSplit; }
  // Whether the outcome depends on more than a piece's text, namely its origin_bytes.
  bool uses_origin() const { return uses_origin_; }

  // Runs one stage on a non-empty piece. The emitted pieces are non-empty and live until `emit`
  // returns.
  void RunStage(size_t stage, Piece piece, RegexScratch& scratch,
                FunctionRef<void(Piece)> emit) const;

 private:
  enum class StageKind { kSplit, kPrefixSpace, kByteLevel, kMetaspace };
  struct Stage {
    StageKind kind;
    Matcher matcher;
    SplitBehavior behavior = SplitBehavior::kIsolated;
    bool invert = false;
    MetaspaceOptions metaspace;
  };

  void Add(const Json& json, const std::string& where);
  void AddSplit(Matcher matcher, SplitBehavior behavior, bool invert = false);

  std::vector<Stage> stages_;
  bool uses_origin_ = false;
};

}  // namespace winnow::tok
