#include "tokenizer/tokenizer_impl.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "tokenizer/json_fields.h"
#include "tokenizer/tokenizer_class.h"
#include "tokenizer/tokenizer_file.h"
#include "tokenizer/utf8.h"

namespace winnow {

namespace tok {

std::unique_ptr<EncodeContext> ContextPool::Take() {
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      std::unique_ptr<EncodeContext> context = std::move(free_.back());
      free_.pop_back();
      return context;
    }
  }
  return std::make_unique<EncodeContext>();
}

void ContextPool::Return(std::unique_ptr<EncodeContext> context) {
  // A huge document must not leave its working memory behind.
  constexpr size_t kKeptSymbols = size_t{1} << 16;
  if (context->bpe.ids.capacity() > kKeptSymbols) context->bpe = BpeScratch();
  const std::lock_guard lock(mutex_);
  free_.push_back(std::move(context));
}

namespace {

// The name in a bos_token or eos_token: a string or an AddedToken object.
std::optional<std::string> TokenName(const Fields& config, const char* field) {
  const Json* token = config.Find(field);
  if (token == nullptr) return std::nullopt;
  if (token->is_string()) return token->get<std::string>();
  return Fields(*token, config.where() + ": " + field).String("content");
}

}  // namespace
}  // namespace tok

Tokenizer::Impl::Impl(std::string_view tokenizer_json, std::string_view config_json,
                      const std::string& where) {
  tok::TokenizerFile file = tok::ParseTokenizerFile(tokenizer_json, where);
  const tok::Fields fields(file.rest, where);
  for (const auto& [name, value] : file.rest.items()) {
    static constexpr std::string_view kKnown[] = {"version",        "truncation", "padding",
                                                  "added_tokens",   "normalizer", "pre_tokenizer",
                                                  "post_processor", "decoder",    "model"};
    if (std::find(std::begin(kKnown), std::end(kKnown), name) == std::end(kKnown)) {
      fields.Fail(fmt::format("unknown field \"{}\"", name.substr(0, 60)));
    }
  }
  if (const std::string version = fields.OptionalString("version").value_or("1.0");
      version != "1.0") {
    fields.Fail(fmt::format("unknown version \"{}\"", version.substr(0, 60)));
  }
  model = tok::Bpe(file, where);
  if (const Json* json = fields.Find("normalizer")) {
    normalizer = tok::Normalizer::FromJson(*json, where + ": normalizer");
  }
  if (const Json* json = fields.Find("pre_tokenizer")) {
    pre_tokenizer = tok::PreTokenizer::FromJson(*json, where + ": pre_tokenizer");
  }
  if (const Json* json = fields.Find("added_tokens")) {
    added_tokens = tok::AddedTokens(*json, model.vocab(), normalizer, where + ": added_tokens");
  }
  if (const Json* json = fields.Find("post_processor")) {
    post_processor = tok::PostProcessor::FromJson(
        *json, [this](int32_t id) { return HasId(id); }, where + ": post_processor");
  }
  if (const Json* json = fields.Find("decoder")) {
    decoder = tok::Decoder::FromJson(*json, where + ": decoder");
  }
  if (!config_json.empty()) ReadConfig(config_json, where);
}

void Tokenizer::Impl::ReadConfig(std::string_view config_json, const std::string& where) {
  const std::string place = where + ": tokenizer_config.json";
  const Json json = ParseJson(config_json, place);
  const tok::Fields config(json, place);
  const tok::RebuildingClass* rebuilding =
      tok::FindRebuildingClass(config.OptionalString("tokenizer_class").value_or(""));
  const auto find = [&](const char* field, const char* fallback) -> std::optional<int32_t> {
    std::optional<std::string> name = tok::TokenName(config, field);
    if (fallback != nullptr && !json.contains(field)) name = fallback;
    const int32_t id = name ? TokenToId(*name) : tok::TokenTable::kNone;
    return id == tok::TokenTable::kNone ? std::nullopt : std::optional(id);
  };
  bos_id = find("bos_token", rebuilding != nullptr ? rebuilding->bos_token : nullptr);
  eos_id = find("eos_token", rebuilding != nullptr ? rebuilding->eos_token : nullptr);
  if (rebuilding == nullptr) return;
  post_processor = {};
  const auto add = [&](const char* flag, bool fallback, const char* field,
                       const std::optional<int32_t>& id, std::vector<int32_t>& ids) {
    if (!config.Bool(flag, fallback)) return;
    if (!id) {
      config.Fail(fmt::format("{} is true but the tokenizer has no {}", flag, field),
                  "correct tokenizer_config.json");
    }
    ids.push_back(*id);
  };
  add("add_bos_token", rebuilding->adds_bos, "bos_token", bos_id, post_processor.prefix);
  add("add_eos_token", false, "eos_token", eos_id, post_processor.suffix);
}

int32_t Tokenizer::Impl::TokenToId(std::string_view token) const {
  const int32_t added = added_tokens.Find(token);
  return added != tok::TokenTable::kNone ? added : model.vocab().Find(token);
}

bool Tokenizer::Impl::HasId(int32_t id) const {
  return model.vocab().HasId(id) || added_tokens.by_id().contains(id);
}

std::string_view Tokenizer::Impl::IdToToken(int32_t id) const {
  const auto found = added_tokens.by_id().find(id);
  return found != added_tokens.by_id().end() ? found->second.content : model.vocab().Token(id);
}

std::string_view Tokenizer::Impl::TextOf(int32_t id) const {
  const auto found = added_tokens.by_id().find(id);
  return found != added_tokens.by_id().end() ? found->second.text : model.vocab().Token(id);
}

bool Tokenizer::Impl::IsSkipped(int32_t id) const {
  const auto found = added_tokens.by_id().find(id);
  return found != added_tokens.by_id().end() && found->second.is_skipped;
}

int32_t Tokenizer::Impl::max_id() const {
  const auto& added = added_tokens.by_id();
  return std::max(model.vocab().max_id(), added.empty() ? -1 : added.rbegin()->first);
}

void Tokenizer::Impl::EncodeText(std::string_view text, tok::EncodeContext& context,
                                 std::vector<int32_t>& ids) const {
  added_tokens.Cut(text, /*normalized=*/false, [&](tok::Span raw, int32_t raw_id) {
    if (raw_id != tok::TokenTable::kNone) {
      ids.push_back(raw_id);
      return;
    }
    tok::Text part;
    std::string_view part_text = text.substr(raw.begin, raw.end - raw.begin);
    part.origin_bytes = raw.begin == 0 ? tok::CharBytes(part_text[0]) : 0;
    if (!normalizer.empty()) {
      part.bytes = part_text;
      normalizer.Apply(part, context.regex);
      part_text = part.bytes;
    }
    added_tokens.Cut(part_text, /*normalized=*/true, [&](tok::Span span, int32_t id) {
      if (id != tok::TokenTable::kNone) {
        ids.push_back(id);
        return;
      }
      EncodePiece(0, tok::CutPiece({part_text, part.origin_bytes}, span),
                  /*parent_is_cached=*/false, context, ids);
    });
  });
}

// The ids of a piece depend on its text and the stages it has still to go through, so the cache is
// asked as early as possible: after the first stage that cuts text into words. A piece that a later
// stage leaves as it is will be remembered by the earlier one.
void Tokenizer::Impl::EncodePiece(size_t stage, tok::Piece piece, bool parent_is_cached,
                                  tok::EncodeContext& context, std::vector<int32_t>& ids) const {
  const bool is_cached = piece.text.size() <= tok::WordCache::kMaxWordBytes && !parent_is_cached &&
                         (stage == 0 || pre_tokenizer.Cuts(stage - 1)) &&
                         !(pre_tokenizer.uses_origin() && piece.origin_bytes > 0);
  const auto kind = static_cast<uint32_t>(stage);
  if (is_cached && context.cache.Find(kind, piece.text, ids)) return;
  const size_t first = ids.size();
  if (stage == pre_tokenizer.num_stages()) {
    model.Encode(piece.text, context.cache, context.bpe, ids);
  } else {
    pre_tokenizer.RunStage(stage, piece, context.regex, [&](tok::Piece next) {
      const bool is_same = next.text.size() == piece.text.size();
      EncodePiece(stage + 1, next, (is_cached || parent_is_cached) && is_same, context, ids);
    });
  }
  if (is_cached) context.cache.Insert(kind, piece.text, std::span(ids).subspan(first));
}

}  // namespace winnow
