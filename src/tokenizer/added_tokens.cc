#include "tokenizer/added_tokens.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "tokenizer/json_fields.h"
#include "tokenizer/utf8.h"

namespace winnow::tok {
namespace {

// Bounds the time of a search in repetitive text; real ones are below 100 bytes.
constexpr size_t kMaxContentBytes = 4096;
// Of all together; bounds the search tree.
constexpr size_t kMaxTotalBytes = size_t{4} << 20;

size_t SpaceStart(std::string_view text) {
  size_t start = text.size();
  while (start > 0) {
    const Char c = CharBefore(text, start);
    if (!IsSpace(c.code)) break;
    start -= c.bytes;
  }
  return start;
}

size_t SpaceEnd(std::string_view text) {
  size_t end = 0;
  while (end < text.size()) {
    const Char c = CharAt(text, end);
    if (!IsSpace(c.code)) break;
    end += c.bytes;
  }
  return end;
}

bool IsSingleWord(std::string_view text, Span match) {
  const bool joined_left = match.begin > 0 && IsWordCharacter(CharBefore(text, match.begin).code);
  const bool joined_right =
      match.end < text.size() && IsWordCharacter(CharAt(text, match.end).code);
  return !joined_left && !joined_right;
}

}  // namespace

TokenTrie::TokenTrie(std::vector<std::string> patterns) : patterns_(std::move(patterns)) {
  // Sorted, the patterns that share a prefix are a range; a node is a range and a depth.
  std::vector<uint32_t> order(patterns_.size());
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return patterns_[a] < patterns_[b]; });
  struct Work {
    size_t begin, end, depth;
  };
  std::vector<Work> work = {{0, order.size(), 0}};
  nodes_.push_back({0, 0, -1});
  for (size_t node = 0; node < work.size(); ++node) {
    auto [begin, end, depth] = work[node];
    // Of equal patterns the first is the one to report.
    for (; begin < end && patterns_[order[begin]].size() == depth; ++begin) {
      if (nodes_[node].pattern < 0) nodes_[node].pattern = static_cast<int32_t>(order[begin]);
    }
    nodes_[node].first_edge = static_cast<uint32_t>(edges_.size());
    while (begin < end) {
      const char byte = patterns_[order[begin]][depth];
      size_t next = begin;
      while (next < end && patterns_[order[next]][depth] == byte) ++next;
      edges_.push_back({static_cast<unsigned char>(byte), static_cast<uint32_t>(nodes_.size())});
      if (node == 0) first_[static_cast<unsigned char>(byte)] = edges_.back().node;
      nodes_.push_back({0, 0, -1});
      work.push_back({begin, next, depth + 1});
      begin = next;
    }
    nodes_[node].num_edges = static_cast<uint32_t>(edges_.size()) - nodes_[node].first_edge;
  }
}

const TokenTrie::Edge* TokenTrie::Step(uint32_t node, char byte) const {
  const auto begin = edges_.begin() + nodes_[node].first_edge;
  const auto end = begin + nodes_[node].num_edges;
  const auto wanted = static_cast<unsigned char>(byte);
  const auto found = std::lower_bound(
      begin, end, wanted, [](const Edge& edge, unsigned char b) { return edge.byte < b; });
  return found != end && found->byte == wanted ? &*found : nullptr;
}

bool TokenTrie::Search(std::string_view text, size_t from, Span* match, size_t* pattern) const {
  for (size_t start = from; start < text.size(); ++start) {
    uint32_t node = first_[static_cast<unsigned char>(text[start])];
    if (node == 0) continue;
    bool found = false;
    for (size_t end = start + 1;; ++end) {
      if (nodes_[node].pattern >= 0) {
        found = true;
        *match = {start, end};
        *pattern = static_cast<size_t>(nodes_[node].pattern);
      }
      if (end == text.size()) break;
      const Edge* edge = Step(node, text[end]);
      if (edge == nullptr) break;
      node = edge->node;
    }
    if (found) return true;
  }
  return false;
}

AddedToken AddedTokens::Parse(const Json& json, const std::string& where) {
  const Fields fields(json, where);
  AddedToken token;
  token.id = fields.Integer("id");
  token.content = fields.String("content");
  token.single_word = fields.Bool("single_word");
  token.lstrip = fields.Bool("lstrip");
  token.rstrip = fields.Bool("rstrip");
  token.normalized = fields.Bool("normalized");
  token.special = fields.Bool("special");
  if (token.content.size() > kMaxContentBytes) {
    fields.Fail(
        fmt::format("content of {} bytes, more than {}", token.content.size(), kMaxContentBytes));
  }
  return token;
}

AddedTokens::AddedTokens(const Json& json, const TokenTable& vocab, const Normalizer& normalizer,
                         const std::string& where) {
  if (!json.is_array()) {
    throw ModelError(fmt::format("{}: expected an array, got {}", where, json.type_name()));
  }
  // The order in which the library tries equal patterns: special tokens first.
  std::vector<int32_t> special;
  std::vector<int32_t> others;
  auto next_id = static_cast<int64_t>(vocab.size());
  size_t total_bytes = 0;
  int index = 0;
  for (const Json& entry : json) {
    const std::string place = fmt::format("{}[{}]", where, index++);
    AddedToken token = Parse(entry, place);
    if (token.content.empty()) continue;  // as in the library
    const auto fail = [&](const std::string& problem) {
      throw ModelError(fmt::format("{}: \"{}\" has id {}, {}", place, token.content.substr(0, 100),
                                   token.id, problem));
    };
    total_bytes += token.content.size();
    if (total_bytes > kMaxTotalBytes) fail("and the added tokens are too long together");
    if (ids_.contains(token.content)) fail("and the token was added before");
    const int32_t in_vocab = vocab.Find(token.content);
    const int64_t expected = in_vocab != TokenTable::kNone ? in_vocab : next_id;
    if (token.id != expected) fail(fmt::format("but its place in the vocabulary is {}", expected));
    if (in_vocab == TokenTable::kNone && vocab.HasId(token.id)) {
      fail(fmt::format("which is that of \"{}\"", vocab.Token(token.id).substr(0, 100)));
    }
    // The next free id is one more than the largest added one, once that is beyond the vocabulary.
    if (expected >= next_id) next_id = expected + 1;
    (token.special ? special : others).push_back(token.id);
    ids_.emplace(token.content, token.id);
    by_id_.emplace(token.id, std::move(token));
  }
  special.insert(special.end(), others.begin(), others.end());
  RegexScratch scratch;
  for (auto& [id, token] : by_id_) {
    Text text{token.content};
    if (token.normalized) normalizer.Apply(text, scratch);
    if (text.bytes.empty()) {
      throw ModelError(fmt::format("{}: the normalizer leaves nothing of \"{}\"", where,
                                   token.content.substr(0, 100)));
    }
    token.text = std::move(text.bytes);
    const auto same_content = ids_.find(token.text);
    token.is_skipped = same_content != ids_.end() && by_id_.at(same_content->second).special;
  }
  raw_ = MakeSet(false, special);
  normalized_ = MakeSet(true, special);
}

AddedTokens::Set AddedTokens::MakeSet(bool normalized, const std::vector<int32_t>& order) const {
  Set set;
  std::vector<std::string> patterns;
  for (const int32_t id : order) {
    const AddedToken& token = by_id_.at(id);
    if (token.normalized != normalized) continue;
    patterns.push_back(token.text);
    set.tokens.push_back(&token);
  }
  set.trie = TokenTrie(std::move(patterns));
  return set;
}

int32_t AddedTokens::Find(std::string_view content) const {
  const auto found = ids_.find(content);
  return found == ids_.end() ? TokenTable::kNone : found->second;
}

void AddedTokens::Cut(std::string_view text, bool normalized,
                      FunctionRef<void(Span, int32_t)> part) const {
  const Set& set = normalized ? normalized_ : raw_;
  size_t done = 0;
  size_t from = 0;
  Span match{};
  size_t pattern = 0;
  while (!set.trie.empty() && set.trie.Search(text, from, &match, &pattern)) {
    from = match.end;  // also behind a match that is discarded
    const AddedToken& token = *set.tokens[pattern];
    if (token.single_word && !IsSingleWord(text, match)) continue;
    if (token.lstrip) match.begin = std::max(SpaceStart(text.substr(0, match.begin)), done);
    if (token.rstrip) match.end += SpaceEnd(text.substr(match.end));
    // Spaces that the last token swallowed with rstrip leave nothing of this one.
    if (token.lstrip && match.begin >= match.end) continue;
    if (done < match.begin) part({done, match.begin}, TokenTable::kNone);
    part(match, token.id);
    done = match.end;
  }
  if (done != text.size()) part({done, text.size()}, TokenTable::kNone);
}

}  // namespace winnow::tok
