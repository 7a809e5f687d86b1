// The byte-pair encoding model: pieces of text to ids by merging the adjacent pair of lowest rank
// (leftmost first) until no merge applies. Same ids as the reference library, which keeps a queue
// of possible merges; short pieces take a simpler loop with the same outcome, and long ones are
// first cut where no merge can reach across.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/token_table.h"
#include "tokenizer/tokenizer_file.h"
#include "tokenizer/word_cache.h"

namespace winnow::tok {

// Ranks of the pairs that merge, by the ids of their parts.
class MergeTable {
 public:
  static constexpr uint32_t kNone = 0xFFFFFFFF;

  explicit MergeTable(size_t num_merges = 0);
  // A later rank for the same pair wins.
  void Set(int32_t left, int32_t right, uint32_t rank);
  // kNone if the pair does not merge.
  uint32_t Rank(int32_t left, int32_t right) const;

 private:
  struct Slot {
    uint64_t pair;
    uint32_t rank;
  };
  size_t SlotOf(uint64_t pair) const;

  std::vector<Slot> slots_;
  int shift_;  // 64 - log2 of the number of slots
};

// Working memory of one encoding thread.
struct BpeScratch {
  std::vector<int32_t> ids;
  std::vector<uint32_t> ranks;
  std::vector<uint32_t> next;
  std::vector<uint32_t> previous;
  std::vector<uint64_t> queue;
  std::string character;
};

class Bpe {
 public:
  Bpe() = default;
  // Throws ModelError naming `where`. Takes the bytes and the vocabulary out of `file`.
  Bpe(TokenizerFile& file, const std::string& where);

  const TokenTable& vocab() const { return vocab_; }

  // Appends the ids of one piece. ModelError if it has an unknown character and the model's
  // unk_token is not in the vocabulary.
  void Encode(std::string_view piece, WordCache& cache, BpeScratch& scratch,
              std::vector<int32_t>& ids) const;

  // Word-cache kind of the chunks that long pieces are cut into; other kinds are free.
  static constexpr uint32_t kChunkKind = 0xFFFF;

 private:
  void ReadOptions(const Json& model, const std::string& where);
  void ReadMerges(const TokenizerFile& file, const std::string& where);
  int32_t CharacterId(std::string_view character) const;
  bool CanCut(char32_t left, char32_t right) const;
  void EncodeChunk(std::string_view chunk, BpeScratch& scratch, std::vector<int32_t>& ids) const;
  // Fills scratch.ids with one symbol per character or byte.
  void Symbols(std::string_view chunk, BpeScratch& scratch) const;
  bool ByteFallback(std::string_view character, std::vector<int32_t>& symbols) const;
  void MergeShort(BpeScratch& scratch) const;
  void MergeLong(BpeScratch& scratch) const;

  TokenTable vocab_;
  MergeTable merges_;
  std::vector<int32_t> merged_ids_;             // by rank
  std::array<int32_t, 0x800> character_ids_{};  // of characters of up to two bytes
  std::array<int32_t, 256> byte_ids_{};         // of <0xNN>
  std::vector<uint64_t> joined_characters_;     // bits: pairs (by hash) some merge joins
  std::optional<std::string> unk_token_;
  int32_t unk_id_ = TokenTable::kNone;
  std::string continuing_subword_prefix_;
  std::string end_of_word_suffix_;
  bool fuse_unk_ = false;
  bool byte_fallback_ = false;
  bool ignore_merges_ = false;
  // Whether a merge's text is always its parts' text joined, none of them empty. Only then is the
  // short loop the same as the queue, and only then can pieces be cut.
  bool is_plain_ = true;
};

}  // namespace winnow::tok
