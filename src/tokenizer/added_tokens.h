// The added tokens of a tokenizer.json: text that becomes one id before the model sees it. One set
// is cut out of the raw text, the other (normalized: true) out of the normalized text.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"  // Json
#include "tokenizer/function_ref.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/regex.h"
#include "tokenizer/token_table.h"

namespace winnow::tok {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = true;
  bool special = false;
  // What decoding gives: the content, or what the normalizer makes of it if `normalized`.
  std::string text;
  // Whether decoding may skip it: the library looks the text up among the contents of the special
  // tokens, so a special token that its normalizer changes is not skipped.
  bool is_skipped = false;
};

// Leftmost-longest search for many strings at once.
class TokenTrie {
 public:
  // Patterns are non-empty; of equal ones the first wins.
  explicit TokenTrie(std::vector<std::string> patterns = {});

  bool empty() const { return patterns_.empty(); }
  // The longest pattern at the first position >= from where one starts.
  bool Search(std::string_view text, size_t from, Span* match, size_t* pattern) const;

 private:
  struct Node {
    uint32_t first_edge;
    uint32_t num_edges;
    int32_t pattern;  // that ends here, or -1
  };
  struct Edge {
    unsigned char byte;
    uint32_t node;
  };
  const Edge* Step(uint32_t node, char byte) const;

  std::vector<std::string> patterns_;
  std::vector<Node> nodes_;
  std::vector<Edge> edges_;            // a node's edges are together, by byte
  std::array<uint32_t, 256> first_{};  // node after the first byte; 0: no pattern starts so
};

class AddedTokens {
 public:
  AddedTokens() = default;
  AddedTokens(AddedTokens&&) = default;  // no copies: the sets point into by_id_
  AddedTokens& operator=(AddedTokens&&) = default;
  // Throws ModelError naming `where`; `vocab` is the model's. The library numbers added tokens by
  // itself and ignores the file's ids; a file where the two differ is refused.
  AddedTokens(const Json& json, const TokenTable& vocab, const Normalizer& normalizer,
              const std::string& where);

  const std::map<int32_t, AddedToken>& by_id() const { return by_id_; }
  // TokenTable::kNone if absent.
  int32_t Find(std::string_view content) const;

  // Calls `part` for the parts of `text` from left to right, none of them empty: an added token
  // with its id, or text between with TokenTable::kNone. `normalized` says which set is searched.
  void Cut(std::string_view text, bool normalized, FunctionRef<void(Span, int32_t)> part) const;

 private:
  struct Set {
    TokenTrie trie;
    std::vector<const AddedToken*> tokens;  // by pattern
  };
  static AddedToken Parse(const Json& json, const std::string& where);
  Set MakeSet(bool normalized, const std::vector<int32_t>& order) const;

  std::map<int32_t, AddedToken> by_id_;
  std::map<std::string, int32_t, std::less<>> ids_;
  Set raw_;
  Set normalized_;
};

}  // namespace winnow::tok
