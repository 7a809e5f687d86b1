// What the server answers, over a real loopback socket.
#include "serve/server_test_support.h"

// The packaged library is not instrumented, so ThreadSanitizer does not see that its static tables
// are made under a guard. Nothing else is left out.
extern "C" const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() {
  return "called_from_lib:libcpp-httplib.so\n";
}

namespace winnow {
namespace {

TEST(Server, SaysWhatItIs) {
  Running running;
  auto client = running.Client();
  for (const char* path : {"/health", "/v1/health"}) {
    const auto health = client.Get(path);
    EXPECT_EQ(health->status, 200);
    EXPECT_EQ(OrderedJson::parse(health->body), OrderedJson({{"status", "ok"}}));
  }
  const OrderedJson models = OrderedJson::parse(client.Get("/v1/models")->body);
  EXPECT_EQ(models["object"], "list");
  EXPECT_EQ(models["data"][0]["id"], "sample");
  EXPECT_EQ(models["data"][0]["object"], "model");
  const OrderedJson properties = OrderedJson::parse(client.Get("/props")->body);
  EXPECT_EQ(properties["context_tokens"], 128);
  EXPECT_EQ(properties["num_experts"], OrderedJson({8, 8}));
  const auto page = client.Get("/");
  EXPECT_TRUE(page->body.starts_with("<!doctype html>"));
  EXPECT_NE(page->get_header_value("Content-Security-Policy").find("default-src 'none'"),
            std::string::npos);
  const auto metrics = client.Get("/metrics");
  EXPECT_TRUE(metrics->get_header_value("Content-Type").starts_with("text/plain; version=0.0.4"));
  EXPECT_NE(metrics->body.find("endpoint=\"/v1/models\",status=\"200\"} 1\n"), std::string::npos);
}

TEST(Server, TokenizesThereAndBack) {
  Running running;
  const std::string text = "Une forêt, 日本";
  const OrderedJson tokens =
      Post(running, "/tokenize", OrderedJson({{"content", text}}).dump())["tokens"];
  EXPECT_EQ(tokens, OrderedJson(SampleTokenizer().Encode(text, false)));
  const OrderedJson back = Post(running, "/detokenize", OrderedJson({{"tokens", tokens}}).dump());
  EXPECT_EQ(back["content"], text);
  Post(running, "/detokenize", R"({"tokens": [-3]})", 400);
  Post(running, "/tokenize", R"({"content": "a", "prompt": "b"})", 400);
}

TEST(Server, CompletesAndRepeatsItself) {
  Running running;
  const std::string body =
      R"({"model": "sample", "prompt": "The fox", "max_tokens": 9, "seed": 5, "n": 2})";
  const OrderedJson first = Post(running, "/v1/completions", body);
  const OrderedJson second = Post(running, "/v1/completions", body);
  EXPECT_EQ(first["object"], "text_completion");
  ASSERT_EQ(first["choices"].size(), 2u);
  EXPECT_EQ(first["choices"], second["choices"]);
  EXPECT_NE(first["id"], second["id"]);
  const auto prompt = SampleTokenizer().Encode("The fox", true);
  EXPECT_EQ(first["usage"]["prompt_tokens"], prompt.size());
  EXPECT_EQ(first["usage"]["completion_tokens"], 18);
  EXPECT_EQ(first["usage"]["total_tokens"], prompt.size() + 18);
  EXPECT_EQ(first["choices"][0]["finish_reason"], "length");
  EXPECT_TRUE(first["choices"][0]["logprobs"].is_null());
  EXPECT_EQ(first["winnow"]["seed"], 5);
  EXPECT_EQ(second["timings"]["predicted_n"], 18);
  EXPECT_GT(second["timings"]["cached_n"], 0);
  EXPECT_GT(second["timings"]["experts_per_token"], 1.0);
  // Ids give what the text gives.
  OrderedJson ids = OrderedJson::parse(body);
  ids["prompt"] = prompt;
  EXPECT_EQ(Post(running, "/v1/completions", ids.dump())["choices"], first["choices"]);
}

TEST(Server, AStreamAddsUpToTheWholeAnswer) {
  Running running;
  for (const char* path : {"/v1/completions", "/v1/chat/completions"}) {
    const bool chat = std::string(path) != "/v1/completions";
    OrderedJson body = {{"max_tokens", 20}, {"seed", 3}, {"n", 2}};
    body["logprobs"] = chat ? OrderedJson(true) : OrderedJson(2);
    if (chat) body["top_logprobs"] = 2;
    if (chat) {
      body["messages"] = {{{"role", "user"}, {"content", "Hello"}}};
    } else {
      body["prompt"] = "Hello";
    }
    const OrderedJson whole = Post(running, path, body.dump());
    body["stream"] = true;
    body["stream_options"] = {{"include_usage", true}};
    const std::vector<OrderedJson> chunks = Stream(running, path, body.dump());
    ASSERT_GT(chunks.size(), 4u);
    std::vector<std::string> text(2), reason(2);
    std::vector<OrderedJson> scores(2, OrderedJson::array());
    std::vector<bool> had_role(2);
    for (size_t i = 0; i + 1 < chunks.size(); ++i) {
      EXPECT_EQ(chunks[i]["object"], chat ? "chat.completion.chunk" : "text_completion");
      EXPECT_EQ(chunks[i]["id"], chunks[0]["id"]);
      EXPECT_TRUE(chunks[i]["usage"].is_null());
      const OrderedJson& choice = chunks[i]["choices"][0];
      const auto index = choice["index"].get<size_t>();
      if (chat) {
        const bool role = choice["delta"].contains("role");
        EXPECT_EQ(role, !had_role[index]);
        had_role[index] = true;
        text[index] += choice["delta"].value("content", "");
      } else {
        text[index] += choice["text"].get<std::string>();
      }
      if (!choice["logprobs"].is_null()) {
        const OrderedJson& list = choice["logprobs"][chat ? "content" : "token_logprobs"];
        for (const OrderedJson& one : list) scores[index].push_back(one);
      }
      if (!choice["finish_reason"].is_null()) reason[index] = choice["finish_reason"];
    }
    for (size_t i = 0; i < 2; ++i) {
      const OrderedJson& expected = whole["choices"][i];
      EXPECT_EQ(text[i], chat ? expected["message"]["content"] : expected["text"]);
      EXPECT_EQ(scores[i], expected["logprobs"][chat ? "content" : "token_logprobs"]);
      EXPECT_EQ(reason[i], expected["finish_reason"]);
    }
    EXPECT_TRUE(chunks.back()["choices"].empty());
    OrderedJson usage = whole["usage"], streamed = chunks.back()["usage"];
    usage.erase("prompt_tokens_details");
    streamed.erase("prompt_tokens_details");
    EXPECT_EQ(streamed, usage);
  }
}

TEST(Server, ChatUsesTheTemplate) {
  Running running;
  const OrderedJson chat = Post(running, "/v1/chat/completions",
                                R"({"messages": [{"role": "user", "content": "Hello"}], "seed": 3,
      "max_completion_tokens": 6, "chat_template_kwargs": {"note": "!"}})");
  EXPECT_EQ(chat["object"], "chat.completion");
  EXPECT_EQ(chat["choices"][0]["message"]["role"], "assistant");
  const OrderedJson plain =
      Post(running, "/v1/completions",
           OrderedJson({{"prompt", SampleTokenizer().Encode("user: Hello! assistant:", false)},
                        {"seed", 3},
                        {"max_tokens", 6}})
               .dump());
  EXPECT_EQ(chat["choices"][0]["message"]["content"], plain["choices"][0]["text"]);
  const OrderedJson error = Post(running, "/v1/chat/completions",
                                 R"({"messages": [{"role": "alien", "content": "a"}]})", 400);
  EXPECT_EQ(error["error"]["code"], "chat_template_error");
}

// What lm-eval's local-completions model relies on, for max_tokens 1 as it sends it, and for 0.
TEST(Server, EchoedLogprobsAreWhatLmEvalReads) {
  Running running;
  for (const int max_tokens : {1, 0}) {
    const std::vector<int32_t> a = SampleTokenizer().Encode("The forêt is 日本 dark", true);
    const std::vector<int32_t> b = SampleTokenizer().Encode("A", true);
    const OrderedJson json = Post(running, "/v1/completions",
                                  OrderedJson({{"model", "sample"},
                                               {"prompt", {a, b}},
                                               {"temperature", 0},
                                               {"max_tokens", max_tokens},
                                               {"logprobs", 1},
                                               {"seed", 1234},
                                               {"echo", true}})
                                      .dump());
    ASSERT_EQ(json["choices"].size(), 2u);
    size_t index = 0;
    for (const std::vector<int32_t>& prompt : {a, b}) {
      const OrderedJson& choice = json["choices"][index];
      EXPECT_EQ(choice["index"], index++);
      const OrderedJson& logprobs = choice["logprobs"];
      const size_t count = prompt.size() + static_cast<size_t>(max_tokens);
      for (const char* field : {"tokens", "token_logprobs", "top_logprobs", "text_offset"}) {
        ASSERT_EQ(logprobs[field].size(), count) << field;
      }
      EXPECT_TRUE(logprobs["token_logprobs"][0].is_null());
      EXPECT_TRUE(logprobs["top_logprobs"][0].is_null());
      // What the model itself says of every position.
      FakeRunner runner(SampleRunner(1, 128));
      std::vector<std::vector<float>> rows;
      runner.Prefill(
          0, prompt, static_cast<int64_t>(prompt.size()),
          [&](int64_t, std::span<const float> row) { rows.emplace_back(row.begin(), row.end()); });
      for (size_t i = 1; i < count; ++i) {
        const auto best = std::max_element(rows[i - 1].begin(), rows[i - 1].end());
        const auto argmax = static_cast<int32_t>(best - rows[i - 1].begin());
        const int32_t token = i < prompt.size() ? prompt[i] : argmax;
        const PositionScore score = ScorePosition(rows[i - 1], token, 1);
        EXPECT_EQ(logprobs["token_logprobs"][i], score.chosen.log_probability);
        double most = -1e9;
        for (const auto& [text, value] : logprobs["top_logprobs"][i].items()) {
          most = std::max(most, value.get<double>());
        }
        EXPECT_EQ(most, score.likeliest[0].log_probability);
        EXPECT_EQ(most == logprobs["token_logprobs"][i].get<double>(), token == argmax);
      }
      const std::string text = choice["text"];
      int64_t last = 0;
      for (const OrderedJson& offset : logprobs["text_offset"]) {
        EXPECT_GE(offset.get<int64_t>(), last);
        last = offset;
      }
      EXPECT_LE(last, CountCharacters(text));
    }
  }
}

TEST(Server, EchoOfATextBeginsWithIt) {
  Running running;
  const std::string prompt = "Hello  <there>\n";
  const OrderedJson json = Post(
      running, "/v1/completions",
      OrderedJson({{"prompt", prompt}, {"echo", true}, {"max_tokens", 4}, {"logprobs", 0}}).dump());
  const std::string text = json["choices"][0]["text"];
  EXPECT_TRUE(text.starts_with(prompt));
  for (const OrderedJson& top : json["choices"][0]["logprobs"]["top_logprobs"]) {
    EXPECT_TRUE(top.is_null() || top.size() == 1);  // the token itself
  }
}

TEST(Server, ReportsExperts) {
  Running running;
  const std::vector<OrderedJson> chunks = Stream(
      running, "/v1/completions",
      R"({"prompt": "Hello", "max_tokens": 6, "stream": true, "winnow": {"experts": true}})");
  size_t tokens = 0, skipped = 0;
  for (const OrderedJson& chunk : chunks) {
    const OrderedJson& report = chunk["choices"][0]["winnow"];
    for (size_t i = 0; i < report["experts"].size(); ++i, ++tokens) {
      ASSERT_EQ(report["experts"][i].size(), 2u);  // layers
      int first = 0;
      for (size_t layer = 0; layer < 2; ++layer) {
        std::vector<int> selected = report["experts"][i][layer];
        const std::vector<int> left_out = report["skipped"][i][layer];
        skipped += left_out.size();
        selected.insert(selected.end(), left_out.begin(), left_out.end());
        // Used and skipped together are what the fake's router selects: two neighbours.
        ASSERT_EQ(selected.size(), 2u);
        EXPECT_EQ(selected[1], (selected[0] + 1) % 8);
        if (layer == 0) first = selected[0];
        EXPECT_EQ(selected[0], (first + static_cast<int>(layer)) % 8);
      }
    }
  }
  EXPECT_EQ(tokens, 6u);
  EXPECT_GT(skipped, 0u);
}

}  // namespace
}  // namespace winnow
