#include "chat/conversation.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace winnow {
namespace {

const char* const kTwoTurns =
    R"({"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "Yes."},
                     {"role": "user", "content": "b?"}, {"role": "assistant", "content": "No."}]})";

ChatTemplate Parse(const char* source) {
  return ChatTemplate::Parse(source, "t", OrderedJson::object());
}

// The texts that count in a conversation.
std::vector<std::string> Counted(const ChatTemplate& chat_template, const char* json) {
  const Conversation conversation = ConversationFromJson(json, "line");
  const RenderedChat chat = chat_template.RenderMarked(
      conversation.messages, {.add_generation_prompt = false, .variables = conversation.variables});
  std::vector<std::string> texts;
  for (const auto& [begin, end] : AssistantSpans(chat_template, conversation, chat)) {
    texts.push_back(chat.text.substr(begin, end - begin));
  }
  return texts;
}

using Texts = std::vector<std::string>;

TEST(Conversation, TheAssistantsTurnsCountWithTheirEnds) {
  const ChatTemplate plain = Parse(
      "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
      "{% if add_generation_prompt %}<assistant>{% endif %}");
  EXPECT_EQ(Counted(plain, kTwoTurns), (Texts{"Yes.</>", "No.</>"}));
  EXPECT_EQ(Counted(plain, R"({"messages": [{"role": "user", "content": "a?"}]})"), Texts{});
  // No header that a prompt could write: what follows the user's turn.
  const ChatTemplate bare = Parse(
      "{% for m in messages %}{{ '[' ~ m.content ~ ']' if m.role == 'user' else m.content ~ '.' }}"
      "{% endfor %}");
  EXPECT_EQ(Counted(bare, kTwoTurns), (Texts{"Yes..", "No.."}));
}

TEST(Conversation, EndsThatChangeDoNotCount) {
  const ChatTemplate without_last_end = Parse(
      "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
      "{{ '</>' if m.role == 'assistant' and not loop.last }}|"
      "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}");
  EXPECT_EQ(Counted(without_last_end, kTwoTurns), (Texts{"Yes.", "No.|"}));
}

TEST(Conversation, WhatTheTemplateMarksCounts) {
  const ChatTemplate marked = Parse(
      "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
      "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}");
  EXPECT_EQ(Counted(marked, kTwoTurns), (Texts{"Yes.", "No."}));
}

TEST(Conversation, RewrittenTurnsDoNotCount) {
  // Thoughts are written for the last turn alone; the prompt opens them.
  const ChatTemplate thinking = Parse(
      "{% for m in messages %}<{{ m.role }}>{{ '(hm)' if loop.last and m.role == 'assistant' }}"
      "{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>({% endif %}");
  EXPECT_EQ(Counted(thinking, kTwoTurns), (Texts{"hm)No.</>"}));
}

TEST(Conversation, WeightsFollowTheTokensOfTheWholeText) {
  const fs::path folder = fs::path(WINNOW_TEST_DATA) / "tokenizers";
  for (const char* style : {"mixtral", "mixtral-metaspace", "qwen", "llama3"}) {
    SCOPED_TRACE(style);
    const Tokenizer tokenizer = Tokenizer::Load(folder / style);
    const ChatTemplate chat_template = *ChatTemplate::Load(folder / style);
    const Conversation conversation = ConversationFromJson(kTwoTurns, "line");
    const EncodedConversation encoded =
        EncodeConversation(chat_template, tokenizer, conversation, "line");
    const std::string text =
        chat_template.Render(conversation.messages, {.add_generation_prompt = false});
    EXPECT_EQ(encoded.ids, tokenizer.Encode(text, false));
    ASSERT_EQ(encoded.weights.size(), encoded.ids.size());
    std::vector<int32_t> counted;
    for (size_t i = 0; i < encoded.ids.size(); ++i) {
      if (encoded.weights[i] > 0) counted.push_back(encoded.ids[i]);
    }
    std::string words;
    for (const int32_t id : counted) words += tokenizer.Decode(std::span(&id, 1), true);
    EXPECT_NE(words.find("Yes."), std::string::npos) << words;
    EXPECT_NE(words.find("No."), std::string::npos) << words;
    EXPECT_EQ(words.find('?'), std::string::npos) << words;
    EXPECT_EQ(words.find("user"), std::string::npos) << words;
    EXPECT_EQ(words.find("INST"), std::string::npos) << words;
  }
}

TEST(Conversation, KeysOfALineAreVariables) {
  const Conversation conversation = ConversationFromJson(
      R"({"messages": [], "add_generation_prompt": true, "tools": [1],
          "chat_template_kwargs": {"enable_thinking": false}})",
      "line");
  EXPECT_TRUE(conversation.add_generation_prompt);
  EXPECT_EQ(conversation.variables.dump(), R"({"tools":[1],"enable_thinking":false})");
}

TEST(Conversation, RefusalsNameTheLine) {
  EXPECT_THROW(ConversationFromJson("[]", "line"), ModelError);
  EXPECT_THROW(ConversationFromJson(R"({"messages": 5})", "line"), ModelError);
  EXPECT_THROW(ConversationFromJson(R"({"messages": [], "add_generation_prompt": 1})", "line"),
               ModelError);
  const Tokenizer tokenizer = Tokenizer::Load(fs::path(WINNOW_TEST_DATA) / "tokenizers" / "qwen");
  const auto fault = [&](const char* source) -> std::string {
    try {
      EncodeConversation(Parse(source), tokenizer, ConversationFromJson(kTwoTurns, "f: line 3"),
                         "f: line 3");
    } catch (const ModelError& error) {
      return error.what();
    }
    return {};
  };
  EXPECT_EQ(fault("{{ raise_exception('no system') }}"), "f: line 3: no system");
  EXPECT_EQ(fault("{{ messages | length }}").find("f: line 3: the chat template renders what"), 0U);
}

}  // namespace
}  // namespace winnow
