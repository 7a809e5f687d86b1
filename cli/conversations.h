// The chat template of a model for verbs that read conversations.
#pragma once

#include <string>

#include "chat/chat_template.h"   // ChatTemplate
#include "text/text_source.h"     // ConversationEncoder
#include "tokenizer/tokenizer.h"  // Tokenizer

namespace winnow::cli {

// `path`: a model folder, or a file in it. ModelError if it has no chat template.
ChatTemplate LoadChatTemplate(const std::string& path);

// For reading .jsonl lines with `messages`; the template is loaded at the first one. `tokenizer`
// must outlive the result. For one thread.
ConversationEncoder MakeConversationEncoder(const std::string& model_folder,
                                            const Tokenizer& tokenizer);

}  // namespace winnow::cli
