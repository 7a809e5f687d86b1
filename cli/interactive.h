// winnow run -i: a conversation on the terminal.
#pragma once

#include <optional>
#include <string>

#include "chat/chat_template.h"  // ChatTemplate
#include "session.h"             // Session
#include "text_answer.h"         // TextAnswerer

namespace winnow::cli {

// What a conversation begins with.
struct ConversationStart {
  std::optional<ChatTemplate> chat_template;  // nothing: lines are continued as plain text
  std::string system;                         // empty: no system message
  bool stats = false;
};

// Reads lines from standard input until it ends or /exit. Ctrl-C ends an answer, and the program if
// none is being given.
int RunInteractive(Session& session, const Tokenizer& tokenizer, TextAnswerer& answerer,
                   const ConversationStart& start);

// The prompt of one user message under the template.
std::vector<int32_t> ChatPrompt(const ChatTemplate& chat_template, const Tokenizer& tokenizer,
                                const OrderedJson& messages);

}  // namespace winnow::cli
