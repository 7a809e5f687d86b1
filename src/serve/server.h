// The HTTP server in front of a scheduler: connections, routes, limits, authorisation. The verb
// `serve` makes one; its endpoints are those of docs/SERVING.md. Errors always have the form of
// api_error.h.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "serve/api_service.h"  // ApiService
#include "serve/metrics.h"      // Metrics

namespace winnow {

struct ServerOptions {
  std::string host = "127.0.0.1";
  int port = 8080;               // 0: any that is free
  std::string api_key = {};      // empty: none is asked for
  std::string cors_origin = {};  // empty: no other site's page may call; "*": any
  // Also what all bodies share: BodyMemoryBytes of it is held at once (body_budget.h), then 503.
  size_t max_body_bytes = size_t{16} << 20;
  int max_connections = 128;  // each holds a thread; those beyond are told 503
  // Bounds of slow clients, see ConnectionLimits.
  std::chrono::milliseconds head_time{10'000}, body_time{60'000}, write_time{30'000},
      idle_time{15'000};
  // Faults of the server itself, never of a request. Called from several threads.
  std::function<void(const std::string&)> on_fault = {};
};

class Server {
 public:
  // Both must outlive it.
  Server(ServerOptions options, ApiService& service, Metrics& metrics);
  ~Server();

  // Takes the port; its number. RuntimeError if it cannot.
  int Bind();
  // Answers until Stop. Once per server, after Bind.
  void Run();
  // From any thread: requests that come from now on, on old connections too, are answered with
  // status 503 or not at all.
  void BeginStop();
  // Ends Run; every connection that is still busy is cut.
  void Stop();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Whether two secrets are equal, in a time that depends on their lengths alone.
bool EqualSecrets(const std::string& a, const std::string& b);

}  // namespace winnow
