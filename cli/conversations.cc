#include "conversations.h"

#include <fmt/format.h>

#include <memory>
#include <optional>
#include <system_error>

#include "base/error.h"
#include "chat/conversation.h"

namespace winnow::cli {

ChatTemplate LoadChatTemplate(const std::string& path) {
  std::error_code ignored;
  const fs::path folder =
      fs::is_directory(path, ignored) ? fs::path(path) : fs::path(path).parent_path();
  std::optional<ChatTemplate> found = ChatTemplate::Load(folder);
  if (found) return std::move(*found);
  throw ModelError(fmt::format("{}: the model has no chat template", path),
                   "put the template of its instruct version there as chat_template.jinja");
}

ConversationEncoder MakeConversationEncoder(const std::string& model_folder,
                                            const Tokenizer& tokenizer) {
  auto chat_template = std::make_shared<std::optional<ChatTemplate>>();
  return [chat_template, model_folder, &tokenizer](std::string_view json,
                                                   const std::string& where) -> CountedIds {
    if (!*chat_template) chat_template->emplace(LoadChatTemplate(model_folder));
    EncodedConversation encoded =
        EncodeConversation(**chat_template, tokenizer, ConversationFromJson(json, where), where);
    return {std::move(encoded.ids), std::move(encoded.weights)};
  };
}

}  // namespace winnow::cli
