// The parts of a loaded tokenizer. Private to this folder.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/decoder.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/post_processor.h"
#include "tokenizer/pre_tokenizer.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/word_cache.h"

namespace winnow {

namespace tok {

// What one Encode call writes to. Kept between calls for its cache of words.
struct EncodeContext {
  RegexScratch regex;
  WordCache cache;
  BpeScratch bpe;
};

// Contexts not in use. As many exist as Encode calls have ever run at once.
class ContextPool {
 public:
  std::unique_ptr<EncodeContext> Take();
  void Return(std::unique_ptr<EncodeContext> context);

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<EncodeContext>> free_;
};

}  // namespace tok

struct Tokenizer::Impl {
  tok::Normalizer normalizer;
  tok::PreTokenizer pre_tokenizer;
  tok::Bpe model;
  tok::AddedTokens added_tokens;
  tok::PostProcessor post_processor;
  tok::Decoder decoder;
  std::optional<int32_t> bos_id;
  std::optional<int32_t> eos_id;
  mutable tok::ContextPool contexts;

  Impl(std::string_view tokenizer_json, std::string_view config_json, const std::string& where);

  int32_t TokenToId(std::string_view token) const;
  bool HasId(int32_t id) const;
  std::string_view IdToToken(int32_t id) const;
  // For decoding: the token's text, and whether it is left out where special tokens are skipped.
  std::string_view TextOf(int32_t id) const;
  bool IsSkipped(int32_t id) const;
  int32_t max_id() const;

  // Appends the ids of valid UTF-8 text, without the post-processor.
  void EncodeText(std::string_view text, tok::EncodeContext& context,
                  std::vector<int32_t>& ids) const;

 private:
  void ReadConfig(std::string_view config_json, const std::string& where);
  void EncodePiece(size_t stage, tok::Piece piece, bool parent_is_cached,
                   tok::EncodeContext& context, std::vector<int32_t>& ids) const;
};

}  // namespace winnow
