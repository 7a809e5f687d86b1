#include "chat/conversation.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "base/error.h"

namespace winnow {
namespace {

using Span = std::pair<size_t, size_t>;

bool IsAssistant(const OrderedJson& message) {
  return message.contains("role") && message["role"] == "assistant";
}

// The first `count` messages; nothing if the template refuses them without the rest.
std::optional<std::string> RenderFirst(const ChatTemplate& chat_template,
                                       const Conversation& conversation, size_t count,
                                       bool add_generation_prompt) {
  OrderedJson first = OrderedJson::array();
  for (size_t i = 0; i < count; ++i) first.push_back(conversation.messages[i]);
  ChatOptions options{.add_generation_prompt = add_generation_prompt,
                      .variables = conversation.variables};
  try {
    return chat_template.Render(first, options);
  } catch (const UsageError&) {
    return std::nullopt;
  } catch (const ModelError&) {
    return std::nullopt;
  }
}

size_t CommonBytes(std::string_view a, std::string_view b) {
  const auto [end, ignored] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  return static_cast<size_t>(end - a.begin());
}

// Where the answer that is message `index` begins: behind what comes before it and the header that
// a generation prompt writes, as far as the whole text has it.
std::optional<size_t> AnswerBegin(const ChatTemplate& chat_template,
                                  const Conversation& conversation, const std::string& text,
                                  size_t index) {
  const auto before = RenderFirst(chat_template, conversation, index, false);
  const auto prompted = RenderFirst(chat_template, conversation, index, true);
  if (!before || !prompted || !text.starts_with(*before)) return std::nullopt;
  size_t begin = CommonBytes(text, *prompted);
  // Not inside a character.
  while (begin > 0 && begin < text.size() &&
         (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) {
    --begin;
  }
  return std::max(begin, before->size());
}

}  // namespace

Conversation ConversationFromJson(std::string_view json, const std::string& where) {
  OrderedJson line = ParseOrderedJson(json, where);
  if (!line.is_object() || !line.contains("messages") || !line["messages"].is_array()) {
    throw ModelError(fmt::format("{}: expected an object with a list \"messages\"", where),
                     "{\"messages\": [{\"role\": \"user\", \"content\": \"...\"}, ...]}");
  }
  Conversation conversation;
  for (auto& [key, value] : line.items()) {
    if (key == "messages") {
      conversation.messages = std::move(value);
    } else if (key == "add_generation_prompt") {
      if (!value.is_boolean()) {
        throw ModelError(fmt::format("{}: add_generation_prompt is {}, expected true or false",
                                     where, value.type_name()));
      }
      conversation.add_generation_prompt = value.get<bool>();
    } else if (key == "chat_template_kwargs" && value.is_object()) {
      for (auto& [name, variable] : value.items()) conversation.variables[name] = variable;
    } else {
      conversation.variables[key] = std::move(value);
    }
  }
  return conversation;
}

std::vector<Span> AssistantSpans(const ChatTemplate& chat_template,
                                 const Conversation& conversation, const RenderedChat& rendered) {
  if (chat_template.marks_generation()) return rendered.generated;
  const OrderedJson& messages = conversation.messages;
  std::vector<Span> spans;
  for (size_t i = 0; i < messages.size(); ++i) {
    if (!IsAssistant(messages[i])) continue;
    const bool is_last = i + 1 == messages.size();
    const auto begin = AnswerBegin(chat_template, conversation, rendered.text, i);
    const auto until = is_last ? std::optional(rendered.text)
                               : RenderFirst(chat_template, conversation, i + 1, false);
    if (begin && until && rendered.text.starts_with(*until) && *begin < until->size()) {
      spans.emplace_back(*begin, until->size());
    }
  }
  return spans;
}

EncodedConversation EncodeConversation(const ChatTemplate& chat_template,
                                       const Tokenizer& tokenizer, const Conversation& conversation,
                                       const std::string& where) {
  RenderedChat rendered;
  try {
    rendered = chat_template.RenderMarked(
        conversation.messages,
        {.add_generation_prompt = false, .variables = conversation.variables});
  } catch (const Error& error) {
    throw ModelError(fmt::format("{}: {}", where, error.what()),
                     error.hint().empty() ? "leave the line out" : error.hint());
  }
  EncodedConversation encoded;
  encoded.ids = tokenizer.Encode(rendered.text, false);
  encoded.weights.assign(encoded.ids.size(), 0.0f);
  const std::vector<Span> spans = AssistantSpans(chat_template, conversation, rendered);
  const bool answers = !conversation.messages.empty() && IsAssistant(conversation.messages.back());
  if (spans.empty() && answers && !chat_template.marks_generation()) {
    throw ModelError(
        fmt::format("{}: the chat template renders what comes before the last answer in another "
                    "way once the answer is there, so the answer cannot be told from the rest",
                    where),
        "render the conversations yourself, into `prompt` and `completion`");
  }
  // Tokens that the text up to a place begins with as well end before that place.
  const auto tokens_before = [&](size_t byte) {
    const std::vector<int32_t> part =
        tokenizer.Encode(std::string_view(rendered.text).substr(0, byte), false);
    const auto [end, ignored] =
        std::mismatch(encoded.ids.begin(), encoded.ids.end(), part.begin(), part.end());
    return end - encoded.ids.begin();
  };
  for (const auto& [begin, end] : spans) {
    const auto first = tokens_before(begin);
    const auto last = end == rendered.text.size() ? std::ssize(encoded.ids) : tokens_before(end);
    if (first < last)
      std::fill(encoded.weights.begin() + first, encoded.weights.begin() + last, 1.0f);
  }
  return encoded;
}

}  // namespace winnow
