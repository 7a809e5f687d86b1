// Request bodies: what is accepted, what is refused and by which name; stop strings.
#include "serve/request.h"

#include <gtest/gtest.h>

#include "generate/stop_matcher.h"
#include "serve/body_budget.h"

namespace winnow {
namespace {

constexpr int64_t kVocabulary = 100;

CompletionRequest Completion(const std::string& body) {
  return ParseCompletionRequest(ParseBody(body), kVocabulary);
}

ChatRequest Chat(const std::string& fields) {
  return ParseChatRequest(
      ParseBody(R"({"messages": [{"role": "user", "content": "hi"}])" + fields + "}"), kVocabulary);
}

// The field that a body is refused for.
template <typename Parse>
std::string Refused(Parse parse) {
  try {
    parse();
  } catch (const ApiError& error) {
    EXPECT_EQ(error.status(), 400);
    return error.param();
  }
  return "nothing";
}

// Values take far more memory than their text, so there is a limit before any is made.
TEST(Body, MayHaveSoManyValues) {
  const auto body = [](size_t values) {
    std::string text = R"({"a": [0)";
    for (size_t i = 3; i < values; ++i) text += ",0";
    return text + "]}";
  };
  EXPECT_EQ(ParseBody(body(kMaxBodyValues))["a"].size(), kMaxBodyValues - 2);
  try {
    ParseBody(body(kMaxBodyValues + 1));
    ADD_FAILURE();
  } catch (const ApiError& error) {
    EXPECT_EQ(error.status(), 413);
    EXPECT_EQ(error.code(), "too_many_values");
  }
  // What stands in a string is none.
  const std::string text(2 * kMaxBodyValues, ',');
  EXPECT_EQ(ParseBody(R"({"a": "\"[)" + text + R"("})")["a"], "\"[" + text);
}

TEST(CompletionRequest, DefaultsAreOpenAis) {
  const CompletionRequest request = Completion(R"({"prompt": "a"})");
  EXPECT_EQ(request.settings.max_tokens, 16);
  EXPECT_EQ(request.settings.sampling.temperature, 1.0f);
  EXPECT_EQ(request.settings.sampling.top_p, 1.0f);
  EXPECT_EQ(request.settings.choices, 1);
  EXPECT_FALSE(request.settings.stream);
  EXPECT_FALSE(request.settings.top_logprobs.has_value());
  EXPECT_FALSE(request.settings.seed.has_value());
  EXPECT_TRUE(request.settings.rules.empty());
}

TEST(CompletionRequest, TakesFourFormsOfPrompt) {
  EXPECT_EQ(Completion(R"({"prompt": "a"})").prompts[0].text, "a");
  EXPECT_EQ(Completion(R"({"prompt": ["a", "b"]})").prompts[1].text, "b");
  const CompletionRequest ids = Completion(R"({"prompt": [1, 2]})");
  ASSERT_EQ(ids.prompts.size(), 1u);
  EXPECT_TRUE(ids.prompts[0].is_ids);
  EXPECT_EQ(ids.prompts[0].ids, (std::vector<int32_t>{1, 2}));
  const CompletionRequest lists = Completion(R"({"prompt": [[1], [2, 99]]})");
  ASSERT_EQ(lists.prompts.size(), 2u);
  EXPECT_EQ(lists.prompts[1].ids, (std::vector<int32_t>{2, 99}));
}

TEST(CompletionRequest, NamesTheFieldItRefuses) {
  const std::pair<const char*, const char*> cases[] = {
      {R"("prompt": 3)", "prompt"},
      {R"("prompt": [100])", "prompt"},
      {R"("prompt": [-1])", "prompt"},
      {R"("prompt": [1, "a"])", "prompt"},
      {R"("prompt": ["a", 1])", "prompt"},
      {R"("prompt": {})", "prompt"},
      {R"("max_tokens": -1)", "max_tokens"},
      {R"("max_tokens": 1.5)", "max_tokens"},
      {R"("max_tokens": "9")", "max_tokens"},
      {R"("max_tokens": 1e300)", "max_tokens"},
      {R"("temperature": -0.1)", "temperature"},
      {R"("temperature": true)", "temperature"},
      {R"("top_p": 1.01)", "top_p"},
      {R"("n": 0)", "n"},
      {R"("n": 300)", "n"},
      {R"("n": 200, "prompt": ["a", "b"])", "n"},
      {R"("logprobs": 6)", "logprobs"},
      {R"("logprobs": true)", "logprobs"},
      {R"("stop": [""])", "stop"},
      {R"("stop": 1)", "stop"},
      {R"("stream": "yes")", "stream"},
      {R"("stream_options": {})", "stream_options"},
      {R"("stream": true, "stream_options": {"other": 1})", "stream_options.other"},
      {R"("logit_bias": {"100": 1})", "logit_bias"},
      {R"("logit_bias": {"1x": 1})", "logit_bias"},
      {R"("logit_bias": {"1": 101})", "logit_bias"},
      {R"("logit_bias": [1])", "logit_bias"},
      {R"("presence_penalty": 3)", "presence_penalty"},
      {R"("repetition_penalty": 0)", "repetition_penalty"},
      {R"("min_p": 2)", "min_p"},
      {R"("seed": 1.5)", "seed"},
      {R"("seed": 18446744073709551615)", "seed"},
      {R"("timeout_seconds": 0)", "timeout_seconds"},
      {R"("best_of": 2)", "best_of"},
      {R"("suffix": "x")", "suffix"},
      {R"("grammar": "x")", "grammar"},
      {R"("winnow": {"expert": true})", "winnow.expert"},
      {R"("winnow": 1)", "winnow"},
      {R"("model": 1)", "model"},
  };
  for (const auto& [fields, expected] : cases) {
    const bool has_prompt = std::string(fields).find("prompt") != std::string::npos;
    const std::string body =
        "{" + std::string(has_prompt ? "" : R"("prompt": "a", )") + fields + "}";
    EXPECT_EQ(Refused([&] { Completion(body); }), expected) << body;
  }
  EXPECT_EQ(Refused([] { Completion("{}"); }), "prompt");
}

TEST(CompletionRequest, IgnoresWhatCannotChangeAnAnswer) {
  Completion(R"({"prompt": "a", "user": "me", "metadata": {"a": 1}, "store": false,
                 "suffix": null, "best_of": 1, "anything": null, "max_tokens": 3.0})");
}

TEST(CompletionRequest, RefusesWhatIsNoJsonObject) {
  for (const char* body :
       {"", "[]", "{", "{\"a\": 1, \"a\": 2}", "nul", "{\"prompt\": \"\xff\"}"}) {
    try {
      Completion(body);
      ADD_FAILURE() << body;
    } catch (const ApiError& error) {
      EXPECT_EQ(error.status(), 400) << body;
    }
  }
  std::string deep = R"({"prompt": )";
  for (int i = 0; i < 100'000; ++i) deep += '[';
  EXPECT_THROW(Completion(deep), ApiError);
}

TEST(ChatRequest, JoinsTextPartsAndRefusesOthers) {
  const ChatRequest request =
      ParseChatRequest(ParseBody(R"({"messages": [{"role": "system", "content": "be brief"},
          {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]})"),
                       kVocabulary);
  EXPECT_EQ(request.messages[1]["content"], "a\nb");
  EXPECT_FALSE(request.settings.max_tokens.has_value());
  const std::pair<const char*, const char*> cases[] = {
      {R"([])", "messages"},
      {R"("hi")", "messages"},
      {R"([1])", "messages[0]"},
      {R"([{"content": "a"}])", "messages[0].role"},
      {R"([{"role": "user"}])", "messages[0].content"},
      {R"([{"role": "user", "content": 5}])", "messages[0].content"},
      {R"([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])",
       "messages[0].content"},
      {R"([{"role": "assistant", "content": null, "tool_calls": [{}]}])", "messages[0].tool_calls"},
  };
  for (const auto& [messages, expected] : cases) {
    const std::string body = std::string(R"({"messages": )") + messages + "}";
    EXPECT_EQ(Refused([&] { ParseChatRequest(ParseBody(body), kVocabulary); }), expected) << body;
  }
}

TEST(ChatRequest, KnowsItsOwnNames) {
  EXPECT_EQ(Chat(R"(, "max_completion_tokens": 7)").settings.max_tokens, 7);
  EXPECT_EQ(Chat(R"(, "max_completion_tokens": 7, "max_tokens": 7)").settings.max_tokens, 7);
  EXPECT_EQ(Chat(R"(, "logprobs": true)").settings.top_logprobs, 0);
  EXPECT_EQ(Chat(R"(, "logprobs": true, "top_logprobs": 20)").settings.top_logprobs, 20);
  EXPECT_FALSE(Chat(R"(, "logprobs": false)").settings.top_logprobs.has_value());
  Chat(R"(, "tools": [], "tool_choice": "none", "response_format": {"type": "text"})");
  const std::pair<const char*, const char*> cases[] = {
      {R"(, "max_completion_tokens": 7, "max_tokens": 8)", "max_completion_tokens"},
      {R"(, "top_logprobs": 2)", "top_logprobs"},
      {R"(, "logprobs": true, "top_logprobs": 21)", "top_logprobs"},
      {R"(, "tools": [{"type": "function"}])", "tools"},
      {R"(, "tool_choice": "required")", "tool_choice"},
      {R"(, "response_format": {"type": "json_object"})", "response_format"},
      {R"(, "chat_template_kwargs": 1)", "chat_template_kwargs"},
      {R"(, "echo": true)", "echo"},
  };
  for (const auto& [fields, expected] : cases) {
    EXPECT_EQ(Refused([&, f = fields] { Chat(f); }), expected) << fields;
  }
}

TEST(StopMatcher, FindsStringsAcrossPieces) {
  StopMatcher matcher({"STOP", "\n\n"});
  EXPECT_EQ(matcher.Put("one S"), "one ");
  EXPECT_EQ(matcher.Put("T"), "");
  EXPECT_EQ(matcher.Put("ART\n"), "START");
  EXPECT_EQ(matcher.Put("two S"), "\ntwo ");
  EXPECT_EQ(matcher.Put("TO"), "");
  EXPECT_FALSE(matcher.stopped());
  EXPECT_EQ(matcher.Put("P three"), "");
  EXPECT_TRUE(matcher.stopped());
  EXPECT_EQ(matcher.Put("more"), "");
  EXPECT_EQ(matcher.Finish(), "");
}

TEST(StopMatcher, EndsAtTheFirstOfSeveralAndGivesBackWhatItHeld) {
  StopMatcher two({"bc", "ab"});
  EXPECT_EQ(two.Put("xabc"), "x");
  EXPECT_TRUE(two.stopped());
  StopMatcher held({"aaab"});
  EXPECT_EQ(held.Put("aaaa"), "a");
  EXPECT_EQ(held.Finish(), "aaa");
  StopMatcher none({});
  EXPECT_EQ(none.Put("text"), "text");
}

// However a text is cut, what comes out is the text up to the first stop string.
TEST(StopMatcher, DoesNotDependOnTheCuts) {
  const std::string text = "aabaabaaabab";
  const std::string expected = text.substr(0, text.find("aaab"));
  for (unsigned cuts = 0; cuts < 1u << (text.size() - 1); ++cuts) {
    StopMatcher matcher({"aaab", "bb"});
    std::string shown, piece;
    for (size_t i = 0; i < text.size(); ++i) {
      piece += text[i];
      if ((cuts >> i & 1) == 0 && i + 1 < text.size()) continue;
      shown += matcher.Put(piece);
      piece.clear();
    }
    shown += matcher.Finish();
    ASSERT_EQ(shown, expected) << cuts;
    ASSERT_TRUE(matcher.stopped());
  }
}

}  // namespace
}  // namespace winnow
