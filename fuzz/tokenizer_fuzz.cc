// tokenizer.json as bytes, an optional tokenizer_config.json and a text after it (each behind a
// zero byte): either refused with a ModelError, or a tokenizer whose ids are in range, whose
// streamed text is its decoded text, and which does not depend on what it encoded before.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "tokenizer/tokenizer.h"

namespace {

std::string_view CutPart(std::string_view& rest) {
  const size_t end = rest.find('\0');
  const std::string_view part = rest.substr(0, end);
  rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
  return part;
}

void Check(const winnow::Tokenizer& tokenizer, std::string_view text) {
  for (const bool special : {false, true}) {
    const std::vector<int32_t> ids = tokenizer.Encode(text, special);
    for (const int32_t id : ids) {
      if (id < 0 || id >= tokenizer.vocab_size()) std::abort();
    }
    if (tokenizer.Encode(text, special) != ids) std::abort();
    tokenizer.Decode(ids, special);
    winnow::StreamDecoder decoder(tokenizer, special);
    for (const int32_t id : ids) decoder.Put(id);
    decoder.Finish();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace winnow;
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  const std::string_view json = CutPart(rest), config = CutPart(rest);
  // Patterns with a time that explodes are refused by their limits, but not within a run's
  // patience.
  const std::string_view text = rest.substr(0, 256);
  try {
    const Tokenizer tokenizer = Tokenizer::FromJson(json, config, "fuzz");
    Check(tokenizer,
          "The  quick\tfox's 12345 d\xC3\xA9j\xC3\xA0 vu \xE4\xBD\xA0\xE5\xA5\xBD\n\n<s> end");
    if (!text.empty()) Check(tokenizer, text);
  } catch (const ModelError&) {
  }
  return 0;
}
