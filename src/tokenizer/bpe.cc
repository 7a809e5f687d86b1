#include "tokenizer/bpe.h"

#include <fmt/format.h>

#include <bit>
#include <utility>

#include "base/error.h"
#include "tokenizer/hash_bytes.h"
#include "tokenizer/json_fields.h"
#include "tokenizer/utf8.h"

namespace winnow::tok {
namespace {

constexpr uint64_t kNoPair = ~uint64_t{0};
constexpr size_t kJoinedBits = size_t{1} << 19;

uint64_t PairKey(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

size_t JoinedBit(char32_t left, char32_t right) {
  return MixHash(static_cast<uint64_t>(left) << 32 | right) % kJoinedBits;
}

}  // namespace

MergeTable::MergeTable(size_t num_merges)
    : slots_(std::bit_ceil(num_merges * 2 + 2), Slot{kNoPair, kNone}),
      shift_(64 - std::countr_zero(slots_.size())) {}

size_t MergeTable::SlotOf(uint64_t pair) const {
  const size_t mask = slots_.size() - 1;
  // Ids are small numbers: folding the halves loses nothing before the multiplication.
  size_t slot = (pair ^ pair >> 23) * 0x9E3779B97F4A7C15u >> shift_;
  while (slots_[slot].pair != pair && slots_[slot].pair != kNoPair) slot = (slot + 1) & mask;
  return slot;
}

void MergeTable::Set(int32_t left, int32_t right, uint32_t rank) {
  const uint64_t pair = PairKey(left, right);
  slots_[SlotOf(pair)] = {pair, rank};
}

uint32_t MergeTable::Rank(int32_t left, int32_t right) const {
  return slots_[SlotOf(PairKey(left, right))].rank;
}

Bpe::Bpe(TokenizerFile& file, const std::string& where) {
  const Json* model =
      file.rest.is_object() && file.rest.contains("model") ? &file.rest["model"] : nullptr;
  if (model == nullptr || model->is_null()) {
    throw ModelError(fmt::format("{}: there is no model", where));
  }
  ReadOptions(*model, where + ": model");
  if (!file.has_vocab) throw ModelError(fmt::format("{}: model: vocab is missing", where));
  if (!file.has_merges) throw ModelError(fmt::format("{}: model: merges are missing", where));

  std::vector<TokenTable::Entry> entries;
  entries.reserve(file.vocab.size());
  for (const TokenizerFile::VocabEntry& entry : file.vocab) {
    entries.push_back({entry.token.offset, entry.token.bytes, entry.id});
  }
  vocab_ = TokenTable(file.bytes, std::move(entries), where + ": model.vocab");
  ReadMerges(file, where + ": model.merges");

  std::string character;
  for (char32_t code = 0; code < character_ids_.size(); ++code) {
    character.clear();
    AppendUtf8(code, character);
    character_ids_[code] = vocab_.Find(character);
  }
  for (size_t byte = 0; byte < byte_ids_.size(); ++byte) {
    byte_ids_[byte] = vocab_.Find(fmt::format("<0x{:02X}>", byte));
  }
  if (unk_token_) unk_id_ = vocab_.Find(*unk_token_);
}

void Bpe::ReadOptions(const Json& model, const std::string& where) {
  const Fields fields(model, where);
  const std::string type = fields.OptionalString("type").value_or("BPE");
  if (type != "BPE") {
    fields.Fail(fmt::format("model type \"{}\" is not supported", type.substr(0, 60)),
                "only byte-pair encoding (BPE) is");
  }
  for (const auto& [name, value] : model.items()) {
    static constexpr std::string_view kKnown[] = {"type",
                                                  "dropout",
                                                  "unk_token",
                                                  "continuing_subword_prefix",
                                                  "end_of_word_suffix",
                                                  "fuse_unk",
                                                  "byte_fallback",
                                                  "ignore_merges",
                                                  "vocab",
                                                  "merges"};
    bool known = false;
    for (const std::string_view field : kKnown) known = known || field == name;
    if (!known) fields.Fail(fmt::format("unknown field \"{}\"", name.substr(0, 60)));
    if ((name == "vocab" || name == "merges") && !value.is_null()) {
      fields.Fail(fmt::format("\"{}\" has the wrong type {}", name, value.type_name()));
    }
  }
  if (const Json* dropout = fields.Find("dropout");
      dropout != nullptr && !(dropout->is_number() && dropout->get<double>() == 0.0)) {
    fields.Fail("dropout is not supported", "it makes ids random; set it to null");
  }
  unk_token_ = fields.OptionalString("unk_token");
  continuing_subword_prefix_ = fields.OptionalString("continuing_subword_prefix").value_or("");
  end_of_word_suffix_ = fields.OptionalString("end_of_word_suffix").value_or("");
  fuse_unk_ = fields.Bool("fuse_unk", false);
  byte_fallback_ = fields.Bool("byte_fallback", false);
  ignore_merges_ = fields.Bool("ignore_merges", false);
  is_plain_ = continuing_subword_prefix_.empty() && end_of_word_suffix_.empty();
}

void Bpe::ReadMerges(const TokenizerFile& file, const std::string& where) {
  const size_t num_merges = file.merge_parts.size() / 2;
  merges_ = MergeTable(num_merges);
  merged_ids_.reserve(num_merges);
  joined_characters_.assign(kJoinedBits / 64, 0);
  const size_t prefix_bytes = continuing_subword_prefix_.size();
  std::string merged;
  for (size_t rank = 0; rank < num_merges; ++rank) {
    const std::string_view left = file.Get(file.merge_parts[2 * rank]);
    std::string_view right = file.Get(file.merge_parts[2 * rank + 1]);
    const auto fail = [&](std::string_view token, const char* problem) {
      throw ModelError(fmt::format("{}[{}]: \"{}\" + \"{}\": \"{}\" {}", where, rank,
                                   left.substr(0, 100), right.substr(0, 100), token.substr(0, 200),
                                   problem));
    };
    const int32_t left_id = vocab_.Find(left);
    const int32_t right_id = vocab_.Find(right);
    if (left_id == TokenTable::kNone) fail(left, "is not in the vocabulary");
    if (right_id == TokenTable::kNone) fail(right, "is not in the vocabulary");
    if (right.size() < prefix_bytes ||
        (right.size() > prefix_bytes &&
         (static_cast<unsigned char>(right[prefix_bytes]) & 0xC0) == 0x80)) {
      fail(right, "lacks continuing_subword_prefix");
    }
    if (left.empty() || right.empty()) is_plain_ = false;
    right.remove_prefix(prefix_bytes);
    merged.assign(left).append(right);
    const int32_t merged_id = vocab_.Find(merged);
    if (merged_id == TokenTable::kNone) fail(merged, "is not in the vocabulary");
    merges_.Set(left_id, right_id, static_cast<uint32_t>(rank));
    merged_ids_.push_back(merged_id);
    if (is_plain_) {
      const size_t bit = JoinedBit(CharBefore(left, left.size()).code, CharAt(right, 0).code);
      joined_characters_[bit / 64] |= uint64_t{1} << bit % 64;
    }
  }
}

int32_t Bpe::CharacterId(std::string_view character) const {
  if (character.size() <= 2) return character_ids_[CharAt(character, 0).code];
  return vocab_.Find(character);
}

// No merge's text has the two characters side by side where its parts meet, so nothing can ever
// join them, and both sides can be encoded apart. (The bits are a hash, which can only say "joined"
// too often.)
bool Bpe::CanCut(char32_t left, char32_t right) const {
  const size_t bit = JoinedBit(left, right);
  return (joined_characters_[bit / 64] >> bit % 64 & 1) == 0;
}

void Bpe::Encode(std::string_view piece, WordCache& cache, BpeScratch& scratch,
                 std::vector<int32_t>& ids) const {
  if (ignore_merges_) {
    if (const int32_t id = vocab_.Find(piece); id != TokenTable::kNone) {
      ids.push_back(id);
      return;
    }
  }
  if (!is_plain_ || piece.size() <= WordCache::kMaxWordBytes) {
    return EncodeChunk(piece, scratch, ids);
  }
  size_t begin = 0;
  const auto encode_until = [&](size_t end) {
    const std::string_view chunk = piece.substr(begin, end - begin);
    begin = end;
    if (chunk.size() > WordCache::kMaxWordBytes) return EncodeChunk(chunk, scratch, ids);
    if (cache.Find(kChunkKind, chunk, ids)) return;
    const size_t first = ids.size();
    EncodeChunk(chunk, scratch, ids);
    cache.Insert(kChunkKind, chunk, std::span(ids).subspan(first));
  };
  // Unknown characters stay with their neighbours: they may be fused with each other.
  const auto is_known = [&](size_t at, size_t bytes) {
    return CharacterId(piece.substr(at, bytes)) != TokenTable::kNone;
  };
  Char left = CharAt(piece, 0);
  for (size_t i = left.bytes; i < piece.size(); i += left.bytes) {
    const Char c = CharAt(piece, i);
    if (CanCut(left.code, c.code) && is_known(i - left.bytes, left.bytes) && is_known(i, c.bytes)) {
      encode_until(i);
    }
    left = c;
  }
  encode_until(piece.size());
}

void Bpe::EncodeChunk(std::string_view chunk, BpeScratch& scratch,
                      std::vector<int32_t>& ids) const {
  constexpr size_t kShortSymbols = 64;
  Symbols(chunk, scratch);
  if (scratch.ids.size() > 1) {
    if (is_plain_ && scratch.ids.size() <= kShortSymbols) {
      MergeShort(scratch);
    } else {
      MergeLong(scratch);
    }
  }
  ids.insert(ids.end(), scratch.ids.begin(), scratch.ids.end());
}

void Bpe::Symbols(std::string_view chunk, BpeScratch& scratch) const {
  scratch.ids.clear();
  bool pending_unk = false;
  const auto flush_unk = [&] {
    if (pending_unk) scratch.ids.push_back(unk_id_);
    pending_unk = false;
  };
  const bool decorated = !continuing_subword_prefix_.empty() || !end_of_word_suffix_.empty();
  for (size_t i = 0; i < chunk.size();) {
    std::string_view character = chunk.substr(i, CharBytes(chunk[i]));
    const bool is_first = i == 0;
    i += character.size();
    int32_t id = TokenTable::kNone;
    if (decorated) {
      scratch.character = is_first ? "" : continuing_subword_prefix_;
      scratch.character += character;
      if (i == chunk.size()) scratch.character += end_of_word_suffix_;
      character = scratch.character;
      id = vocab_.Find(character);
    } else {
      id = CharacterId(character);
    }
    if (id != TokenTable::kNone) {
      flush_unk();
      scratch.ids.push_back(id);
      continue;
    }
    // As in the library, an unknown token that waits to be fused comes after the bytes.
    if (byte_fallback_ && ByteFallback(character, scratch.ids)) continue;
    if (!unk_token_) continue;
    if (unk_id_ == TokenTable::kNone) {
      throw ModelError(
          fmt::format("the tokenizer's unk_token \"{}\" is not in its vocabulary, and "
                      "the text has a character that is not either",
                      unk_token_->substr(0, 100)));
    }
    if (!fuse_unk_) flush_unk();
    pending_unk = true;
  }
  flush_unk();
}

bool Bpe::ByteFallback(std::string_view character, std::vector<int32_t>& symbols) const {
  for (const char byte : character) {
    if (byte_ids_[static_cast<uint8_t>(byte)] == TokenTable::kNone) return false;
  }
  for (const char byte : character) symbols.push_back(byte_ids_[static_cast<uint8_t>(byte)]);
  return true;
}

}  // namespace winnow::tok
