// A chat template as bytes and, behind a zero byte, a line with `messages`: either refused, when it
// is parsed or at the messages, or rendered to valid UTF-8, the same each time, with marks inside
// the text.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "base/error.h"
#include "chat/conversation.h"
#include "tokenizer/utf8.h"

namespace {

constexpr std::string_view kLine =
    R"({"messages": [{"role": "system", "content": " Be brief.\n"},
                     {"role": "user", "content": [{"type": "text", "text": "How is é?"}]},
                     {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFine.", "n": 1.5}],
        "tools": [{"function": {"name": "f", "parameters": {"a": null, "b": [1, true]}}}]})";

void Check(const winnow::ChatTemplate& chat_template, const winnow::Conversation& conversation) {
  winnow::ChatOptions options{.variables = conversation.variables, .now = [] { return std::tm{}; }};
  for (const bool prompted : {true, false}) {
    options.add_generation_prompt = prompted;
    const winnow::RenderedChat chat = chat_template.RenderMarked(conversation.messages, options);
    if (winnow::tok::ValidUtf8Prefix(chat.text) != chat.text.size()) std::abort();
    if (chat_template.Render(conversation.messages, options) != chat.text) std::abort();
    const auto spans = winnow::AssistantSpans(chat_template, conversation, chat);
    for (const auto& [begin, end] : spans) {
      if (begin > end || end > chat.text.size()) std::abort();
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace winnow;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = input.find('\0');
  try {
    const std::string_view line = zero == std::string_view::npos ? kLine : input.substr(zero + 1);
    const Conversation conversation = ConversationFromJson(line, "fuzz");
    const ChatTemplate chat_template = ChatTemplate::Parse(
        std::string(input.substr(0, zero)), "fuzz", {{"bos_token", "<s>"}, {"eos_token", "</s>"}});
    Check(chat_template, conversation);
  } catch (const ModelError&) {
  } catch (const UsageError&) {  // raise_exception
  }
  return 0;
}
