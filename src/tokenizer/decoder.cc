#include "tokenizer/decoder.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "base/error.h"
#include "tokenizer/byte_level.h"
#include "tokenizer/json_fields.h"
#include "tokenizer/pre_tokenizer.h"
#include "tokenizer/utf8.h"

namespace winnow::tok {
namespace {

constexpr size_t kMaxSteps = 64;

// Replace steps that double a token again and again must not fill the memory.
size_t LargestSize(size_t bytes) {
  return (size_t{1} << 20) + 64 * bytes;
}

// <0xNN> in either case; Rust's number parser takes a plus sign too.
std::optional<char> ByteToken(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  int value = 0;
  for (size_t i = token[3] == '+' ? 4 : 3; i < 5; ++i) {
    const char c = token[i];
    if (c >= '0' && c <= '9') {
      value = value * 16 + c - '0';
    } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
      value = value * 16 + (c | 0x20) - 'a' + 10;
    } else {
      return std::nullopt;
    }
  }
  return static_cast<char>(value);
}

}  // namespace

Decoder Decoder::FromJson(const Json& json, const std::string& where) {
  Decoder decoder;
  decoder.joins_with_spaces_ = false;
  decoder.Add(json, where);
  return decoder;
}

void Decoder::Add(const Json& json, const std::string& where) {
  const Fields fields(json, where);
  const std::string type = fields.String("type");
  if (steps_.size() >= kMaxSteps) fields.Fail(fmt::format("more than {} steps", kMaxSteps));
  Step step{};
  if (type == "Sequence") {
    int index = 0;
    for (const Json& entry : fields.Array("decoders")) {
      Add(entry, fmt::format("{}.decoders[{}]", where, index++));
    }
    return;
  }
  if (type == "ByteLevel") {
    step.kind = Kind::kByteLevel;
  } else if (type == "ByteFallback") {
    step.kind = Kind::kByteFallback;
  } else if (type == "Fuse") {
    step.kind = Kind::kFuse;
  } else if (type == "Strip") {
    step.kind = Kind::kStrip;
    step.text = fields.Character("content");
    step.start = static_cast<size_t>(fields.Integer("start"));
    step.stop = static_cast<size_t>(fields.Integer("stop"));
  } else if (type == "Replace") {
    step.kind = Kind::kReplace;
    step.matcher = Matcher::FromJson(fields.Get("pattern"), where + ".pattern");
    step.text = fields.String("content");
  } else if (type == "Metaspace") {
    const MetaspaceOptions options = ParseMetaspace(json, where);
    step.kind = Kind::kMetaspace;
    step.text = options.replacement;
    step.drops_first = options.prepend != PrependScheme::kNever;
  } else if (type == "BPEDecoder") {
    step.kind = Kind::kBpe;
    step.text = fields.String("suffix");
    if (step.text.empty()) fields.Fail("\"suffix\" is empty");
  } else {
    fields.Fail(fmt::format("decoder \"{}\" is not supported", type.substr(0, 60)));
  }
  steps_.push_back(std::move(step));
}

DecodeRun::DecodeRun(const Decoder& decoder, bool streaming)
    : decoder_(decoder), streaming_(streaming), states_(decoder.steps_.size() + 1) {
  for (size_t i = 0; i + 1 < states_.size(); ++i) {
    const Decoder::Kind kind = decoder.steps_[i].kind;
    states_[i + 1].is_fused =
        states_[i].is_fused || kind == Decoder::Kind::kFuse || kind == Decoder::Kind::kByteLevel;
  }
}

void DecodeRun::Put(std::string_view token, std::string& out) {
  input_bytes_ += token.size();
  Feed(0, token, out);
}

void DecodeRun::Finish(std::string& out) {
  End(0, out);
}

void DecodeRun::Feed(size_t index, std::string_view token, std::string& out) {
  State& state = states_[index];
  if (index == decoder_.steps_.size()) {
    if (decoder_.joins_with_spaces_ && !std::exchange(state.is_first, false)) out.push_back(' ');
    out.append(token);
    return;
  }
  const Decoder::Step& step = decoder_.steps_[index];
  const bool was_first = std::exchange(state.is_first, false);
  switch (step.kind) {
    case Decoder::Kind::kFuse:
      Feed(index + 1, token, out);
      return;
    case Decoder::Kind::kMetaspace:
      Feed(index + 1,
           ReplaceAll(token, step.text,
                      step.drops_first && (was_first || state.is_fused) ? "" : " "),
           out);
      return;
    case Decoder::Kind::kStrip:
      if (state.is_fused) return FeedStrip(index, token, out);
      return Feed(index + 1, Strip(index, token), out);
    case Decoder::Kind::kReplace: {
      // A pattern of one character cannot straddle two parts of a fused token.
      const std::string& wanted = step.matcher.text();
      if (state.is_fused && (wanted.empty() || CharBytes(wanted[0]) != wanted.size())) {
        state.pending.append(token);
        return;
      }
      return Feed(index + 1, Replace(index, token), out);
    }
    case Decoder::Kind::kBpe:
      // All but the last token get a space for the suffix.
      if (state.is_fused) {
        state.pending.append(token);
        return;
      }
      if (!was_first) Feed(index + 1, ReplaceAll(state.pending, step.text, " "), out);
      state.pending = token;
      return;
    case Decoder::Kind::kByteLevel:
      return FeedByteLevel(index, token, out);
    case Decoder::Kind::kByteFallback:
      return FeedByteFallback(index, token, out);
  }
}

void DecodeRun::End(size_t index, std::string& out) {
  if (index == decoder_.steps_.size()) return;
  const Decoder::Step& step = decoder_.steps_[index];
  State& state = states_[index];
  const std::string pending = std::exchange(state.pending, {});
  switch (step.kind) {
    case Decoder::Kind::kByteFallback:
      state.pending = pending;
      if (state.is_fused) {
        if (const std::optional<char> byte = ByteToken(pending)) {
          state.pending = std::string(1, *byte);
        } else {
          state.pending.clear();
          Feed(index + 1, pending, out);
        }
      }
      EndByteRun(index, out);
      break;
    case Decoder::Kind::kByteLevel: {
      std::string bytes;
      if (state.is_fused) {
        AppendByteLevelBytes(pending, bytes);
      } else {
        bytes = pending;
      }
      std::string text;
      AppendLossyUtf8(bytes, text);
      if (!text.empty()) Feed(index + 1, text, out);
      break;
    }
    case Decoder::Kind::kReplace:
      if (!pending.empty()) Feed(index + 1, Replace(index, pending), out);
      break;
    case Decoder::Kind::kBpe:
      if (!state.is_first) Feed(index + 1, ReplaceAll(pending, step.text, ""), out);
      break;
    case Decoder::Kind::kStrip:  // `pending` is what the end strips; more than `stop` never waits
    case Decoder::Kind::kFuse:
    case Decoder::Kind::kMetaspace:
      break;
  }
  End(index + 1, out);
}

void DecodeRun::FeedByteLevel(size_t index, std::string_view token, std::string& out) {
  State& state = states_[index];
  if (state.is_fused) {
    state.pending.append(token);
    return;
  }
  AppendByteLevelBytes(token, state.pending);
  std::string text;
  std::string_view bytes = state.pending;
  while (!bytes.empty()) {
    const size_t valid = ValidUtf8Prefix(bytes);
    text.append(bytes.substr(0, valid));
    bytes.remove_prefix(valid);
    if (bytes.empty()) break;
    const Utf8Step step = ClassifyUtf8(bytes, 0);
    if (step.status == Utf8Status::kIncomplete) break;
    AppendUtf8(kReplacementCharacter, text);
    bytes.remove_prefix(step.bytes);
  }
  state.pending = std::string(bytes);
  if (!text.empty()) Feed(index + 1, text, out);
}

void DecodeRun::FeedByteFallback(size_t index, std::string_view token, std::string& out) {
  State& state = states_[index];
  if (state.is_fused) {
    state.pending.append(token);
    return;
  }
  const std::optional<char> byte = ByteToken(token);
  if (!byte) {
    EndByteRun(index, out);
    Feed(index + 1, token, out);
    return;
  }
  state.pending.push_back(*byte);
  if (!streaming_) return;
  const Utf8Step step = ClassifyUtf8(state.pending, 0);
  if (step.status == Utf8Status::kValid) {
    const std::string character = std::exchange(state.pending, {});
    Feed(index + 1, character, out);
  } else if (step.status == Utf8Status::kInvalid) {
    // The bytes before the last one are broken; the last one may begin a character.
    const bool keeps_last = state.pending.size() > 1;
    if (keeps_last) state.pending.pop_back();
    EndByteRun(index, out);
    if (keeps_last) FeedByteFallback(index, token, out);
  }
}

void DecodeRun::EndByteRun(size_t index, std::string& out) {
  const std::string run = std::exchange(states_[index].pending, {});
  if (run.empty()) return;
  if (ValidUtf8Prefix(run) == run.size()) return Feed(index + 1, run, out);
  std::string replacement;
  AppendUtf8(kReplacementCharacter, replacement);
  for (size_t i = 0; i < run.size(); ++i) Feed(index + 1, replacement, out);
}

// Drops up to `start` leading characters of the fused token and holds back the last `stop`.
void DecodeRun::FeedStrip(size_t index, std::string_view part, std::string& out) {
  const Decoder::Step& step = decoder_.steps_[index];
  State& state = states_[index];
  while (state.strips && !part.empty()) {
    if (state.stripped == step.start || !part.starts_with(step.text)) {
      state.strips = false;
    } else {
      ++state.stripped;
      part.remove_prefix(step.text.size());
    }
  }
  if (part.empty()) return;
  std::string text = std::exchange(state.pending, {});
  text.append(part);
  size_t end = text.size();
  for (size_t n = 0; n < step.stop && std::string_view(text).substr(0, end).ends_with(step.text);
       ++n) {
    end -= step.text.size();
  }
  state.pending = text.substr(end);
  if (end > 0) Feed(index + 1, text.substr(0, end), out);
}

std::string DecodeRun::Strip(size_t index, std::string_view token) const {
  const Decoder::Step& step = decoder_.steps_[index];
  for (size_t n = 0; n < step.start && token.starts_with(step.text); ++n) {
    token.remove_prefix(step.text.size());
  }
  for (size_t n = 0; n < step.stop && token.ends_with(step.text); ++n) {
    token.remove_suffix(step.text.size());
  }
  return std::string(token);
}

std::string DecodeRun::Replace(size_t index, std::string_view token) {
  const Decoder::Step& step = decoder_.steps_[index];
  std::string result;
  size_t previous = 0;
  // Of the whole input: steps in a row that each double a token stay within it too.
  const size_t limit = LargestSize(input_bytes_);
  step.matcher.ForEach(token, scratch_, [&](Span match) {
    result.append(token.substr(previous, match.begin - previous));
    result.append(step.text);
    previous = match.end;
    if (result.size() > limit) {
      throw ModelError(
          fmt::format("the tokenizer's decoder makes more than {} bytes of the tokens", limit));
    }
  });
  result.append(token.substr(previous));
  return result;
}

std::string DecodeRun::ReplaceAll(std::string_view token, const std::string& from,
                                  std::string_view to) const {
  std::string result;
  for (;;) {
    const size_t at = token.find(from);
    result.append(token.substr(0, at));
    if (at == std::string_view::npos) return result;
    result.append(to);
    token.remove_prefix(at + from.size());
  }
}

}  // namespace winnow::tok
