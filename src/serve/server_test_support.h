// A server in threads of its own with a model made of arithmetic behind it, and how tests talk to
// it.
#pragma once

#include <gtest/gtest.h>
#include <httplib.h>

#include <thread>

#include "serve/server.h"
#include "serve/test_support.h"

namespace winnow {

inline constexpr const char* kJson = "application/json";

inline ChatRenderer PlainTemplate() {
  return [](const OrderedJson& messages, bool prompted, const OrderedJson& variables) {
    std::string text;
    for (const OrderedJson& message : messages) {
      if (message["role"] == "alien") throw ModelError("the template raised: no such role");
      text += message["role"].get<std::string>() + ": " + message["content"].get<std::string>();
    }
    return text + (variables.contains("note") ? variables["note"].get<std::string>() : "") +
           (prompted ? " assistant:" : "");
  };
}

// A server in threads of its own.
class Running {
 public:
  explicit Running(ServerOptions options = {}, FakeRunner::Options runner = SampleRunner(2, 128),
                   SchedulerOptions scheduling = SampleScheduling())
      : bench_(std::move(runner), std::move(scheduling)),
        service_({.name = "sample",
                  .created = 1,
                  .slots = 2,
                  .moe_layers = {0, 1},
                  .num_experts = {8, 8},
                  .experts_per_token = 2,
                  .render_chat = PlainTemplate()},
                 SampleTokenizer(), bench_.scheduler) {
    options.port = 0;
    server_ = std::make_unique<Server>(std::move(options), service_, bench_.metrics);
    port_ = server_->Bind();
    scheduling_ = std::thread([this] { bench_.scheduler.Run(); });
    serving_ = std::thread([this] { server_->Run(); });
    while (!httplib::Client("127.0.0.1", port_).Get("/health")) std::this_thread::yield();
  }
  ~Running() {
    bench_.scheduler.BeginStop();
    scheduling_.join();
    server_->Stop();
    serving_.join();
  }
  httplib::Client Client() const {
    httplib::Client client("127.0.0.1", port_);
    client.set_keep_alive(true);
    client.set_read_timeout(600);  // sanitizers on a busy machine are slow
    return client;
  }
  int port() const { return port_; }
  Bench& bench() { return bench_; }
  Server& server() { return *server_; }
  // Waits until the counters are so.
  template <typename Condition>
  void Await(Condition condition) {
    while (!condition(bench_.metrics.counts())) std::this_thread::yield();
  }

 private:
  Bench bench_;
  ApiService service_;
  std::unique_ptr<Server> server_;
  int port_ = 0;
  std::thread scheduling_, serving_;
};

inline OrderedJson Post(const Running& running, const std::string& path, const std::string& body,
                        int status = 200) {
  const auto result = running.Client().Post(path, body, kJson);
  if (!result) {
    ADD_FAILURE() << "no answer to " << body;
    return {};
  }
  EXPECT_EQ(result->status, status) << result->body;
  return OrderedJson::parse(result->body);
}

inline std::vector<OrderedJson> Stream(const Running& running, const std::string& path,
                                       const std::string& body) {
  std::vector<OrderedJson> chunks;
  const auto result = running.Client().Post(path, body, kJson);
  if (!result) {
    ADD_FAILURE() << "no answer";
    return chunks;
  }
  EXPECT_EQ(result->get_header_value("Content-Type"), "text/event-stream");
  std::string_view rest = result->body;
  bool done = false;
  while (!rest.empty()) {
    const size_t end = rest.find("\n\n");
    EXPECT_NE(end, std::string_view::npos);
    const std::string_view event = rest.substr(0, end);
    rest.remove_prefix(end + 2);
    EXPECT_TRUE(event.starts_with("data: "));
    EXPECT_FALSE(done);
    done = event == "data: [DONE]";
    if (!done) chunks.push_back(OrderedJson::parse(event.substr(6)));
  }
  EXPECT_TRUE(done);
  return chunks;
}

}  // namespace winnow
