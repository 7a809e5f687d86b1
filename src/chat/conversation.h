// Conversations as calibration and training data: the tokens of the rendered text, and which of
// them the assistant wrote. Called by cli/ for .jsonl lines with `messages`.
//
// What counts are the assistant's turns with what ends them, without the header before them:
//   - where the template marks them ({% generation %}), what it marks;
//   - else a turn is what its message adds to the conversation up to it, rendered with a generation
//     prompt, as long as that text stays as it is in the whole conversation. Templates that rewrite
//     earlier turns (they drop what was thought) leave the last turn alone to count.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "chat/chat_template.h"   // ChatTemplate
#include "tokenizer/tokenizer.h"  // Tokenizer

namespace winnow {

// A line {"messages": [...], "add_generation_prompt": true, ...}: every other key is a variable of
// the template (`tools`, `enable_thinking`), as is every key in `chat_template_kwargs`. ModelError
// naming `where` if it is no such object.
struct Conversation {
  OrderedJson messages;
  bool add_generation_prompt = false;
  OrderedJson variables = OrderedJson::object();
};
Conversation ConversationFromJson(std::string_view json, const std::string& where);

struct EncodedConversation {
  std::vector<int32_t> ids;
  std::vector<float> weights;  // 1 for tokens of the assistant, else 0
};

// Messages start with `where`. ModelError if the template refuses the messages, or if it cannot be
// told which text the assistant wrote.
EncodedConversation EncodeConversation(const ChatTemplate& chat_template,
                                       const Tokenizer& tokenizer, const Conversation& conversation,
                                       const std::string& where);

// The assistant's turns in `rendered`: [begin, end) in bytes, in order, apart from each other.
std::vector<std::pair<size_t, size_t>> AssistantSpans(const ChatTemplate& chat_template,
                                                      const Conversation& conversation,
                                                      const RenderedChat& rendered);

}  // namespace winnow
