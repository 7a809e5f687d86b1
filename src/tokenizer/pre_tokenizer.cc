#include "tokenizer/pre_tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "tokenizer/byte_level.h"
#include "tokenizer/json_fields.h"
#include "tokenizer/utf8.h"

namespace winnow::tok {
namespace {

// Stages call each other, so their number bounds the depth of the stack.
constexpr size_t kMaxStages = 64;
// Each of these can double the text.
constexpr size_t kMaxRewritingStages = 8;

}  // namespace

Piece CutPiece(Piece piece, Span span) {
  const size_t bytes = span.end - span.begin;
  const size_t origin = piece.origin_bytes - std::min(piece.origin_bytes, span.begin);
  return {piece.text.substr(span.begin, bytes), std::min(origin, bytes)};
}

MetaspaceOptions ParseMetaspace(const Json& json, const std::string& where) {
  const Fields fields(json, where);
  MetaspaceOptions options;
  options.replacement = fields.Character("replacement");
  const std::string scheme = fields.OptionalString("prepend_scheme").value_or("always");
  if (scheme == "first") {
    options.prepend = PrependScheme::kFirst;
  } else if (scheme == "never") {
    options.prepend = PrependScheme::kNever;
  } else if (scheme != "always") {
    fields.Fail(fmt::format("unknown prepend_scheme \"{}\"", scheme.substr(0, 60)));
  }
  // The older form says only whether to prepend.
  if (!fields.Bool("add_prefix_space", true)) {
    if (fields.Find("prepend_scheme") != nullptr && options.prepend != PrependScheme::kNever) {
      fields.Fail("add_prefix_space does not match prepend_scheme");
    }
    options.prepend = PrependScheme::kNever;
  }
  options.split = fields.Bool("split", true);
  return options;
}

PreTokenizer PreTokenizer::FromJson(const Json& json, const std::string& where) {
  PreTokenizer result;
  result.Add(json, where);
  return result;
}

void PreTokenizer::AddSplit(Matcher matcher, SplitBehavior behavior, bool invert) {
  stages_.push_back({StageKind::kSplit, std::move(matcher), behavior, invert, {}});
}

void PreTokenizer::Add(const Json& json, const std::string& where) {
  const Fields fields(json, where);
  const std::string type = fields.String("type");
  const auto rewriting = static_cast<size_t>(std::count_if(
      stages_.begin(), stages_.end(), [](const Stage& s) { return s.kind != StageKind::kSplit; }));
  if (stages_.size() >= kMaxStages || rewriting >= kMaxRewritingStages) {
    fields.Fail("too many stages");
  }
  if (type == "Sequence") {
    int index = 0;
    for (const Json& stage : fields.Array("pretokenizers")) {
      Add(stage, fmt::format("{}.pretokenizers[{}]", where, index++));
    }
  } else if (type == "Split") {
    AddSplit(Matcher::FromJson(fields.Get("pattern"), where + ".pattern"),
             ParseSplitBehavior(fields.String("behavior"), where), fields.Bool("invert"));
  } else if (type == "ByteLevel") {
    fields.Bool("trim_offsets");  // must be there; offsets are not computed
    if (fields.Bool("add_prefix_space")) {
      stages_.push_back({StageKind::kPrefixSpace, {}, SplitBehavior::kIsolated, false, {}});
    }
    if (fields.Bool("use_regex", true)) {
      AddSplit(Matcher::FromRegex(kGpt2Pattern, where), SplitBehavior::kIsolated);
    }
    stages_.push_back({StageKind::kByteLevel, {}, SplitBehavior::kIsolated, false, {}});
  } else if (type == "Metaspace") {
    const MetaspaceOptions options = ParseMetaspace(json, where);
    uses_origin_ = uses_origin_ || options.prepend == PrependScheme::kFirst;
    stages_.push_back({StageKind::kMetaspace, {}, SplitBehavior::kIsolated, false, options});
    if (options.split) {
      AddSplit(Matcher::FromText(options.replacement), SplitBehavior::kMergedWithNext);
    }
  } else if (type == "Digits") {
    AddSplit(Matcher::FromSet(IsNumeric), fields.Bool("individual_digits")
                                              ? SplitBehavior::kIsolated
                                              : SplitBehavior::kContiguous);
  } else if (type == "Punctuation") {
    const std::string behavior = fields.OptionalString("behavior").value_or("Isolated");
    AddSplit(Matcher::FromSet(IsPunctuation), ParseSplitBehavior(behavior, where));
  } else if (type == "Whitespace") {
    AddSplit(Matcher::WordRuns(), SplitBehavior::kRemoved, true);
  } else if (type == "WhitespaceSplit") {
    AddSplit(Matcher::FromSet(IsSpace), SplitBehavior::kRemoved);
  } else if (type == "BertPreTokenizer") {
    AddSplit(Matcher::FromSet(IsSpace), SplitBehavior::kRemoved);
    AddSplit(Matcher::FromSet(IsPunctuation), SplitBehavior::kIsolated);
  } else if (type == "CharDelimiterSplit") {
    AddSplit(Matcher::FromText(fields.Character("delimiter")), SplitBehavior::kRemoved);
  } else {
    fields.Fail(fmt::format("pre-tokenizer \"{}\" is not supported", type.substr(0, 60)));
  }
}

void PreTokenizer::RunStage(size_t index, Piece piece, RegexScratch& scratch,
                            FunctionRef<void(Piece)> emit) const {
  const Stage& stage = stages_[index];
  switch (stage.kind) {
    case StageKind::kSplit:
      Split(piece.text, stage.matcher, stage.behavior, stage.invert, scratch,
            [&](Span span) { emit(CutPiece(piece, span)); });
      return;
    case StageKind::kPrefixSpace: {
      if (piece.text.starts_with(' ')) return emit(piece);
      const std::string prefixed = " " + std::string(piece.text);
      return emit({prefixed, piece.origin_bytes > 0 ? piece.origin_bytes + 1 : 0});
    }
    case StageKind::kByteLevel: {
      std::string mapped;
      mapped.reserve(piece.text.size() + piece.text.size() / 2);
      AppendByteLevel(piece.text.substr(0, piece.origin_bytes), mapped);
      const size_t origin_bytes = mapped.size();
      AppendByteLevel(piece.text.substr(piece.origin_bytes), mapped);
      return emit({mapped, origin_bytes});
    }
    case StageKind::kMetaspace: {
      const std::string& mark = stage.metaspace.replacement;
      std::string marked;
      marked.reserve(piece.text.size() + piece.text.size() / 2 + mark.size());
      size_t origin_bytes = piece.origin_bytes;
      for (size_t i = 0; i < piece.text.size(); ++i) {
        if (piece.text[i] != ' ') {
          marked.push_back(piece.text[i]);
          continue;
        }
        if (i < piece.origin_bytes) origin_bytes += mark.size() - 1;
        marked += mark;
      }
      const bool prepend = stage.metaspace.prepend == PrependScheme::kAlways ||
                           (stage.metaspace.prepend == PrependScheme::kFirst && origin_bytes > 0);
      if (prepend && !marked.starts_with(mark)) {
        marked.insert(0, mark);
        if (origin_bytes > 0) origin_bytes += mark.size();
      }
      return emit({marked, origin_bytes});
    }
  }
}

}  // namespace winnow::tok
