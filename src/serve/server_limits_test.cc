// What the server refuses and survives: errors, keys, other sites, nonsense, too much at once,
// clients that go away.
#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include "serve/body_budget.h"
#include "serve/server_test_support.h"

namespace winnow {
namespace {

// A raw connection, for what a decent client does not send.
class RawClient {
 public:
  explicit RawClient(int port) : socket_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  ~RawClient() { Close(); }
  void Send(const std::string& text) { send(socket_, text.data(), text.size(), MSG_NOSIGNAL); }
  // Everything until the server closes.
  std::string ReadAll() {
    std::string text;
    char buffer[4096];
    for (ssize_t got; (got = recv(socket_, buffer, sizeof(buffer), 0)) > 0;) {
      text.append(buffer, static_cast<size_t>(got));
    }
    return text;
  }
  // What comes first.
  std::string ReadSome() {
    char buffer[4096];
    const ssize_t got = recv(socket_, buffer, sizeof(buffer), 0);
    return {buffer, static_cast<size_t>(std::max<ssize_t>(0, got))};
  }
  void Close() {
    if (socket_ >= 0) close(socket_);
    socket_ = -1;
  }

 private:
  int socket_;
};

// A model that waits until the test lets it go on.
struct Gate {
  std::atomic<bool> open{false}, reached{false};
  FakeRunner::Options Runner(int64_t slots = 1) {
    FakeRunner::Options options = SampleRunner(slots, 128);
    options.before_call = [this] {
      reached = true;
      while (!open) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    };
    return options;
  }
};

TEST(Server, ErrorsHaveOneForm) {
  Running running({.max_body_bytes = 1000});
  auto client = running.Client();
  const auto check = [](const httplib::Result& result, int status, const std::string& code) {
    ASSERT_TRUE(result);
    EXPECT_EQ(result->status, status);
    const OrderedJson error = OrderedJson::parse(result->body)["error"];
    EXPECT_EQ(error["code"], code);
    for (const char* field : {"message", "type", "param"}) EXPECT_TRUE(error.contains(field));
  };
  check(client.Get("/v1/nothing"), 404, "unknown_endpoint");
  check(client.Post("/v1/embeddings", "{}", kJson), 404, "unknown_endpoint");
  check(client.Get("/v1/completions"), 405, "method_not_allowed");
  EXPECT_EQ(client.Get("/v1/completions")->get_header_value("Allow"), "POST");
  check(client.Put("/v1/models", "{}", kJson), 405, "method_not_allowed");
  check(client.Options("/v1/models"), 405, "method_not_allowed");
  check(client.Post("/v1/completions", "{", kJson), 400, "invalid_json");
  check(client.Post("/v1/completions", R"({"prompt": "a", "x": 1})", kJson), 400,
        "unknown_parameter");
  check(client.Post("/v1/completions", R"({"prompt": "a", "model": "gpt"})", kJson), 404,
        "model_not_found");
  check(client.Post("/v1/completions", R"({"prompt": []})", kJson), 400, "empty_prompt");
  check(client.Post("/v1/completions", std::string(1001, ' '), kJson), 413, "body_too_large");
  // Without a length too, and compressed or not.
  const auto chunked = [](size_t bytes) {
    return [bytes](size_t, httplib::DataSink& sink) {
      const std::string text(bytes, ' ');
      sink.write(text.data(), text.size());
      sink.done();
      return true;
    };
  };
  check(client.Post("/v1/completions", chunked(5000), kJson), 413, "body_too_large");
  check(client.Post("/v1/completions", chunked(500), kJson), 400, "invalid_json");
  httplib::Client packing("127.0.0.1", running.port());
  packing.set_compress(true);
  check(packing.Post("/v1/completions", std::string(100'000, ' '), kJson), 413, "body_too_large");
  httplib::MultipartFormDataItems form = {{"prompt", "a", "", ""}};
  check(client.Post("/v1/completions", form), 400, "invalid_header");
}

// A client that sends most of a body and waits holds its memory; others are told to try again until
// it goes on.
TEST(Server, BodiesHaveABudgetTogether) {
  Running running({.max_body_bytes = 1000});
  const std::string head = "POST /tokenize HTTP/1.1\r\nConnection: close\r\nContent-Length: ";
  RawClient slow(running.port());
  slow.Send(head + "1000\r\n\r\n" + std::string(900, ' '));
  auto client = running.Client();
  const std::string body = R"({"content": ")" + std::string(200, 'a') + R"("})";
  auto refused = client.Post("/tokenize", body, kJson);
  while (refused && refused->status == 200) {  // until the server has read the 900 bytes
    refused = client.Post("/tokenize", body, kJson);
  }
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->status, 503);
  EXPECT_EQ(OrderedJson::parse(refused->body)["error"]["code"], "too_many_bodies");
  EXPECT_EQ(refused->get_header_value("Retry-After"), "1");
  // What is small still fits, on the same connection.
  EXPECT_EQ(client.Post("/tokenize", R"({"content": "a"})", kJson)->status, 200);
  slow.Send(R"({"content": "a"})" + std::string(84, ' '));
  EXPECT_TRUE(slow.ReadAll().starts_with("HTTP/1.1 200"));
  EXPECT_EQ(client.Post("/tokenize", body, kJson)->status, 200);
  // So has what is made of them: a piece for each byte takes more than all of it.
  const auto pieces =
      client.Post("/tokenize",
                  R"({"with_pieces": true, "content": ")" + std::string(200, 'a') + R"("})", kJson);
  EXPECT_EQ(pieces->status, 413);
  EXPECT_EQ(OrderedJson::parse(pieces->body)["error"]["code"], "text_too_large");
  // An answer that takes long does not hold its body.
  Gate gate;
  Running waiting({.max_body_bytes = 1000}, gate.Runner());
  std::thread first([&] {
    Post(waiting, "/v1/completions",
         R"({"prompt": "Hello", "max_tokens": 1})" + std::string(900, ' '));
  });
  while (!gate.reached) std::this_thread::yield();
  EXPECT_EQ(waiting.Client().Post("/tokenize", body, kJson)->status, 200);
  gate.open = true;
  first.join();
}

TEST(BodyBudget, CountsWhatABodyMayBecome) {
  EXPECT_EQ(BodyMemoryBytes(0), 0u);
  EXPECT_EQ(BodyMemoryBytes(1000), 36'000u);
  EXPECT_EQ(BodyMemoryBytes(size_t{16} << 20), (uint64_t{4 * 16 + 120}) << 20);
  EXPECT_EQ(LargestBodyWithin(36'000, 5000), 1000u);
  EXPECT_EQ(LargestBodyWithin(35'999, 5000), 999u);
  EXPECT_EQ(LargestBodyWithin(UINT64_MAX, 5000), 5000u);
  EXPECT_EQ(LargestBodyWithin(0, 5000), 0u);
  BodyBudget budget(BodyMemoryBytes(1000));
  HeldBody a(budget);
  EXPECT_TRUE(a.Append(std::string(600, 'a')));
  {
    HeldBody b(budget);
    EXPECT_TRUE(b.Append(std::string(400, 'b')));
    EXPECT_FALSE(b.Append("b"));
    EXPECT_EQ(b.text().size(), 400u);
  }
  EXPECT_TRUE(a.Append(std::string(400, 'a')));
  a.Release();
  EXPECT_TRUE(budget.Take(BodyMemoryBytes(1000)));
}

TEST(Server, AsksForTheKey) {
  Running running({.api_key = "secret"});
  auto client = running.Client();
  EXPECT_EQ(client.Get("/health")->status, 200);
  EXPECT_EQ(client.Get("/")->status, 200);
  for (const char* value : {"", "Bearer", "Bearer secres", "Bearer secret2", "secret"}) {
    const auto result = client.Get("/v1/models", {{"Authorization", value}});
    EXPECT_EQ(result->status, 401) << value;
    EXPECT_EQ(result->get_header_value("WWW-Authenticate"), "Bearer");
  }
  EXPECT_EQ(client.Get("/v1/models", {{"Authorization", "Bearer secret"}})->status, 200);
  EXPECT_TRUE(EqualSecrets("a", "a"));
  EXPECT_FALSE(EqualSecrets("a", "b"));
}

TEST(Server, PagesOfOtherSitesAreRefusedUnlessNamed) {
  Running closed;
  const std::string own = "http://127.0.0.1:" + std::to_string(closed.port());
  EXPECT_EQ(closed.Client().Get("/health", {{"Origin", "http://other.example"}})->status, 403);
  EXPECT_EQ(closed.Client().Get("/health", {{"Origin", "null"}})->status, 403);
  EXPECT_EQ(closed.Client().Get("/health", {{"Origin", own}})->status, 200);
  Running open({.cors_origin = "http://other.example"});
  const auto answer = open.Client().Get("/health", {{"Origin", "http://other.example"}});
  EXPECT_EQ(answer->get_header_value("Access-Control-Allow-Origin"), "http://other.example");
  const auto preflight =
      open.Client().Options("/v1/completions", {{"Origin", "http://other.example"}});
  EXPECT_EQ(preflight->status, 204);
  EXPECT_EQ(preflight->get_header_value("Access-Control-Allow-Methods"), "GET, POST");
  EXPECT_EQ(open.Client().Get("/health", {{"Origin", "http://third.example"}})->status, 403);
}

TEST(Server, SurvivesWhatIsNoHttp) {
  Running running({.head_time = std::chrono::milliseconds(200)});
  const std::string nonsense[] = {
      "\r\n\r\n",
      "GET\r\n\r\n",
      "hello\r\n\r\n",
      std::string("\0\1\2\r\n\r\n", 7),
      "GET / HTTP/9.9\r\n\r\n",
      "POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n{}",
      "POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n{}",
      "POST /v1/completions HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n{}",
      "POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nzz\r\n",
      "GET / HTTP/1.1\r\nA: " + std::string(100'000, 'a') + "\r\n\r\n",
      "GET / HTTP/1.1\r\nA"};  // and then nothing: the time for a head is over soon
  for (const std::string& text : nonsense) {
    RawClient client(running.port());
    client.Send(text);
    const std::string answer = client.ReadAll();
    EXPECT_TRUE(answer.empty() || answer.starts_with("HTTP/1.1 4")) << text << answer;
  }
  EXPECT_EQ(running.Client().Get("/health")->status, 200);
}

TEST(Server, RangesAreIgnored) {
  Running running;
  const auto result = running.Client().Get("/", {{"Range", "bytes=0-1,2-3,4-5"}});
  EXPECT_EQ(result->status, 200);
}

TEST(Server, AFullQueueIsA429AndHealthStillAnswers) {
  Gate gate;
  SchedulerOptions scheduling = SampleScheduling();
  scheduling.max_queued_requests = 1;
  Running running({}, gate.Runner(), scheduling);
  const std::string body = R"({"prompt": "Hello", "max_tokens": 3, "temperature": 0})";
  std::vector<std::thread> clients;
  std::atomic<int> answered{0}, refused{0};
  for (int i = 0; i < 20; ++i) {
    // The first has its slot before the others come.
    while (i == 1 && !gate.reached) std::this_thread::yield();
    clients.emplace_back([&] {
      const auto result = running.Client().Post("/v1/completions", body, kJson);
      if (!result) return;
      ++(result->status == 429 ? refused : answered);
      EXPECT_EQ(result->status == 429, result->has_header("Retry-After"));
    });
  }
  while (refused < 18) std::this_thread::yield();  // one runs, one waits
  EXPECT_EQ(running.Client().Get("/health")->status, 200);
  gate.open = true;
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(answered, 2);
  EXPECT_EQ(refused, 18);
}

TEST(Server, ManyStreamsDoNotStarveHealth) {
  Gate gate;
  Running running({}, gate.Runner(2));
  std::vector<std::thread> clients;
  std::atomic<int> complete{0};
  for (int i = 0; i < 64; ++i) {
    clients.emplace_back([&] {
      const auto chunks = Stream(running, "/v1/completions",
                                 R"({"prompt": "Hello", "max_tokens": 3, "stream": true})");
      if (!chunks.empty()) ++complete;
    });
  }
  for (int i = 0; i < 20; ++i) EXPECT_EQ(running.Client().Get("/health")->status, 200);
  gate.open = true;
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(complete, 64);
}

TEST(Server, TooManyConnectionsAreToldSo) {
  Running running({.max_connections = 3, .idle_time = std::chrono::milliseconds(60'000)});
  std::vector<std::unique_ptr<RawClient>> idle;
  for (int i = 0; i < 3; ++i) {
    idle.push_back(std::make_unique<RawClient>(running.port()));
    idle.back()->Send("GET /health HTTP/1.1\r\n\r\n");
    EXPECT_TRUE(idle.back()->ReadSome().starts_with("HTTP/1.1 200"));  // and it stays open
  }
  RawClient more(running.port());
  EXPECT_TRUE(more.ReadAll().starts_with("HTTP/1.1 503"));
}

TEST(Server, AVanishedClientIsCancelled) {
  for (const char* stream : {"false", "true"}) {
    // Slow enough that the answer would take many times what the server needs to notice.
    FakeRunner::Options runner = SampleRunner(1, 4096);
    runner.before_call = [] { std::this_thread::sleep_for(std::chrono::milliseconds(4)); };
    Running running({}, runner);
    const std::string body =
        std::string(R"({"prompt": "Hello", "max_tokens": 4000, "ignore_eos": true, "stream": )") +
        stream + "}";
    RawClient client(running.port());
    client.Send("POST /v1/completions HTTP/1.1\r\nContent-Length: " + std::to_string(body.size()) +
                "\r\n\r\n" + body);
    running.Await([](const SchedulerCounts& counts) { return counts.running_sequences == 1; });
    client.Close();
    running.Await([](const SchedulerCounts& counts) { return counts.cancelled_requests == 1; });
    EXPECT_LT(running.bench().metrics.counts().generated_tokens, 4000u);
  }
}

TEST(Server, DeadlinesAreA503AndEndAStreamWithAnError) {
  FakeRunner::Options runner = SampleRunner(1, 128);
  SchedulerOptions scheduling = SampleScheduling();
  // A clock that goes on by a second at each look.
  auto ticks = std::make_shared<std::atomic<int>>(0);
  scheduling.now = [ticks] {
    return Generation::Clock::time_point{std::chrono::seconds(++*ticks)};
  };
  Running running({}, runner, scheduling);
  const OrderedJson error =
      Post(running, "/v1/completions",
           R"({"prompt": "Hello", "max_tokens": 100, "timeout_seconds": 8})", 503);
  EXPECT_EQ(error["error"]["code"], "timeout");
  const std::vector<OrderedJson> chunks =
      Stream(running, "/v1/completions",
             R"({"prompt": "Hello", "max_tokens": 100, "timeout_seconds": 20, "stream": true})");
  ASSERT_GT(chunks.size(), 1u);
  EXPECT_EQ(chunks.back()["error"]["code"], "timeout");
}

TEST(Server, RefusesWhileItStops) {
  Running running;
  auto client = running.Client();
  EXPECT_EQ(client.Get("/health")->status, 200);
  running.server().BeginStop();
  const auto result = running.Client().Get("/health");
  EXPECT_TRUE(!result || result->status == 503);
}

TEST(Server, APortThatIsTakenIsRefused) {
  Running running;
  Bench bench;
  ApiService service({.name = "other"}, SampleTokenizer(), bench.scheduler);
  Server second({.port = running.port()}, service, bench.metrics);
  EXPECT_THROW(second.Bind(), RuntimeError);
}

}  // namespace
}  // namespace winnow
