#include "serve/server.h"

#include <fmt/format.h>
#include <httplib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "serve/body_budget.h"
#include "serve/http_connection.h"
#include "serve/page.h"

namespace winnow {
namespace {

using httplib::Request;
using httplib::Response;

constexpr const char* kJson = "application/json";
constexpr int kRequestsPerConnection = 1000;
// Threads beyond max_connections, which only say that the server is full.
constexpr int kSpareThreads = 8;
// How often a waiting connection looks whether its client is still there.
constexpr std::chrono::milliseconds kPatience{100};

// Paths and the method each takes; what is not here is a 404 and counted as "other".
const std::map<std::string, std::string>& Endpoints() {
  static const std::map<std::string, std::string> endpoints = {{"/", "GET"},
                                                               {"/health", "GET"},
                                                               {"/v1/health", "GET"},
                                                               {"/v1/models", "GET"},
                                                               {"/metrics", "GET"},
                                                               {"/props", "GET"},
                                                               {"/v1/completions", "POST"},
                                                               {"/v1/chat/completions", "POST"},
                                                               {"/tokenize", "POST"},
                                                               {"/detokenize", "POST"}};
  return endpoints;
}

// Whoever asks whether the server lives, or opens its page, has no key yet.
bool IsOpen(const std::string& path) {
  return path == "/" || path == "/health" || path == "/v1/health";
}

void SetError(Response& response, const ApiError& error) {
  response.status = error.status();
  response.set_content(ErrorJson(error).dump(-1, ' ', true, OrderedJson::error_handler_t::replace),
                       kJson);
  if (error.retry_after_seconds() > 0) {
    response.set_header("Retry-After", std::to_string(error.retry_after_seconds()));
  }
}

void SetJson(Response& response, const OrderedJson& json) {
  response.set_content(json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace), kJson);
}

ApiError TooManyBodies() {
  return ApiError(503, "too_many_bodies",
                  "the bodies of other requests take all memory there is for bodies; try again");
}

bool HasBody(const Request& request) {
  return request.has_header("Transfer-Encoding") ||
         (request.has_header("Content-Length") &&
          request.get_header_value("Content-Length") != "0");
}

}  // namespace

bool EqualSecrets(const std::string& a, const std::string& b) {
  if (a.size() != b.size()) return false;
  unsigned difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i]);
  }
  return difference == 0;
}

// httplib's server with our connections instead of its own.
class GuardedServer : public httplib::Server {
 public:
  GuardedServer(const ConnectionLimits& limits, int max_connections)
      : limits_(limits), max_connections_(max_connections) {}

  // What is wrong with a request before its body is read.
  std::function<std::optional<ApiError>(const Request&)> check;
  std::atomic<bool> stopping{false}, abandoned{false};

  // The library asks for a backlog of 5, which a burst of clients overflows.
  void WidenBacklog() { ::listen(svr_sock_, SOMAXCONN); }

 private:
  bool process_and_close_socket(socket_t socket) override {
    const int open = ++connections_;
    HttpConnection connection(socket, limits_, abandoned);
    if (open > max_connections_) {
      RefuseConnection(connection, 503, "Service Unavailable",
                       ApiError(503, "too_many_connections", "too many connections are open"));
    } else {
      ServeConnection(connection);
    }
    ::shutdown(socket, SHUT_RDWR);
    ::close(socket);
    --connections_;
    return true;
  }

  static void RefuseConnection(HttpConnection& connection, int status, const char* reason,
                               const ApiError& error) {
    const std::string body = ErrorJson(error).dump();
    const std::string head = fmt::format(
        "HTTP/1.1 {} {}\r\nConnection: close\r\nContent-Type: {}\r\nRetry-After: 1\r\n"
        "Content-Length: {}\r\n\r\n",
        status, reason, kJson, body.size());
    const std::string text = head + body;
    connection.write(text.data(), text.size());
    connection.Linger();
  }

  void ServeConnection(HttpConnection& connection) {
    for (int served = 1; served <= kRequestsPerConnection; ++served) {
      if (!connection.WaitForRequest(stopping)) return;
      connection.BeginHead();
      bool closed = false, head_read = false, ends = false;
      const auto set_up = [&](Request& request) {
        head_read = true;
        connection.BeginBody();
        ends = SetUp(connection, request);
      };
      process_request(connection, served == kRequestsPerConnection, closed, set_up);
      if (connection.head_too_long()) {
        RefuseConnection(connection, 431, "Request Header Fields Too Large",
                         ApiError(431, "head_too_large", "the request's head is too long"));
        return;
      }
      if (ends || !head_read) connection.Linger();
      if (ends || !head_read || closed || connection.broken()) return;
    }
  }

  // Whether the connection ends with this request: whenever its body may not be read to its end.
  bool SetUp(HttpConnection& connection, Request& request) const {
    request.ranges.clear();  // no answer is a file
    // A field that only httplib's client uses; here it tells a handler whether it still has one.
    request.progress = [&connection](uint64_t, uint64_t) { return connection.ClientIsThere(); };
    const bool unread = HasBody(request) && (request.method != "POST" || check(request));
    const bool unbounded =
        request.has_header("Transfer-Encoding") || request.has_header("Content-Encoding");
    if (!unread && !unbounded) return false;
    request.headers.erase("Connection");
    request.set_header("Connection", "close");
    return true;
  }

  const ConnectionLimits limits_;
  const int max_connections_;
  std::atomic<int> connections_{0};
};

struct Server::State {
  State(ServerOptions given, ApiService& api, Metrics& counted)
      : options(std::move(given)),
        service(api),
        metrics(counted),
        body_budget(BodyMemoryBytes(options.max_body_bytes)),
        http({.head_time = options.head_time,
              .body_time = options.body_time,
              .write_time = options.write_time,
              .idle_time = options.idle_time},
             options.max_connections) {}

  ServerOptions options;
  ApiService& service;
  Metrics& metrics;
  BodyBudget body_budget;
  GuardedServer http;

  std::optional<ApiError> Check(const Request& request) const;
  bool OriginIsAllowed(const Request& request) const;
  void AddCors(const Request& request, Response& response) const;
  void AddRoutes();
  using JsonHandler = std::function<OrderedJson(const std::string& body)>;
  void AddPost(const std::string& path,
               std::function<void(const Request&, Response&, HeldBody&)> handler);
  void ReadBody(const httplib::ContentReader& reader, HeldBody& body) const;
  void Reserve(HeldBody& body, uint64_t bytes_for_each, uint64_t text_bytes) const;
  void Guard(Response& response, const std::function<void()>& work) const;
  void Answer(const Request& request, Response& response, ApiService::Job job) const;
  static void AnswerWhole(const Request& request, Response& response, ApiService::Job& job);
  static void AnswerStream(const Request& request, Response& response, ApiService::Job job);
};

// A page of another site may send requests to this machine although it cannot read the answers.
bool Server::State::OriginIsAllowed(const Request& request) const {
  const std::string origin = request.get_header_value("Origin");
  if (origin.empty() || options.cors_origin == "*" || origin == options.cors_origin) return true;
  const size_t host = origin.find("://");
  return host != std::string::npos && origin.substr(host + 3) == request.get_header_value("Host");
}

std::optional<ApiError> Server::State::Check(const Request& request) const {
  if (http.stopping) return ApiError(503, "stopping", "the server is stopping");
  if (!OriginIsAllowed(request)) {
    return ApiError(403, "foreign_origin",
                    "pages of other sites may not call this server (serve --cors allows one)");
  }
  if (request.method == "OPTIONS" && !options.cors_origin.empty()) return {};
  const auto endpoint = Endpoints().find(request.path);
  if (endpoint == Endpoints().end()) {
    return ApiError(404, "unknown_endpoint",
                    fmt::format("there is no {}", request.path.substr(0, 128)));
  }
  if (!options.api_key.empty() && !IsOpen(request.path)) {
    const std::string given = request.get_header_value("Authorization");
    if (!EqualSecrets(given, "Bearer " + options.api_key)) {
      return ApiError(401, "invalid_api_key", "the header Authorization: Bearer KEY is wrong");
    }
  }
  if (request.method != endpoint->second &&
      !(request.method == "HEAD" && endpoint->second == "GET"))
    return ApiError(405, "method_not_allowed",
                    fmt::format("{} takes {}", request.path, endpoint->second));
  if (request.method != "POST") return {};
  const std::string length = request.get_header_value("Content-Length");
  const bool is_number = !length.empty() && length.size() < 18 &&
                         length.find_first_not_of("0123456789") == std::string::npos;
  if (!length.empty() && !is_number) {
    return ApiError(400, "invalid_header", "Content-Length is not a number of bytes");
  }
  if (!length.empty() && request.has_header("Transfer-Encoding")) {
    return ApiError(400, "invalid_header",
                    "Content-Length and Transfer-Encoding exclude each other");
  }
  if (is_number && std::stoull(length) > options.max_body_bytes) {
    return ApiError(413, "body_too_large",
                    fmt::format("the body may have {} bytes at most", options.max_body_bytes));
  }
  if (request.get_header_value("Content-Type").starts_with("multipart/")) {
    return ApiError(400, "invalid_header", "Content-Type: expected application/json");
  }
  return {};
}

void Server::State::AddCors(const Request& request, Response& response) const {
  if (options.cors_origin.empty() || !request.has_header("Origin")) return;
  response.set_header("Access-Control-Allow-Origin", options.cors_origin);
  response.set_header("Vary", "Origin");
  if (request.method != "OPTIONS") return;
  response.set_header("Access-Control-Allow-Methods", "GET, POST");
  response.set_header("Access-Control-Allow-Headers", "Authorization, Content-Type");
  response.set_header("Access-Control-Max-Age", "600");
}

void Server::State::ReadBody(const httplib::ContentReader& reader, HeldBody& body) const {
  size_t read_bytes = 0;
  bool too_large = false, no_room = false;
  const bool complete = reader([&](const char* data, size_t size) {
    too_large = size > options.max_body_bytes - read_bytes;
    read_bytes += size;
    // What there is no room for is read to its end all the same: the next request is behind it.
    if (no_room || too_large) return !too_large;
    no_room = !body.Append({data, size});
    if (no_room) body.Release();
    return true;
  });
  if (too_large) {
    throw ApiError(413, "body_too_large",
                   fmt::format("the body may have {} bytes at most", options.max_body_bytes));
  }
  if (!complete) throw ApiError(400, "incomplete_body", "the request's body did not arrive whole");
  if (no_room) throw TooManyBodies();
}

// For what is made of a text; all of it has the memory that bodies have.
void Server::State::Reserve(HeldBody& body, uint64_t bytes_for_each, uint64_t text_bytes) const {
  const uint64_t all = BodyMemoryBytes(options.max_body_bytes);
  const uint64_t copies = kTextCopies * body.text().size();
  if (text_bytes > (all - std::min(all, copies)) / bytes_for_each) {
    throw ApiError(413, "text_too_large",
                   fmt::format("an answer about a text of {} bytes takes more memory than this "
                               "server has for it; send less at a time",
                               text_bytes));
  }
  if (!body.Reserve(bytes_for_each * text_bytes)) throw TooManyBodies();
}

// Nothing a handler throws may reach the library.
void Server::State::Guard(Response& response, const std::function<void()>& work) const {
  try {
    work();
  } catch (const std::exception& error) {
    const ApiError told = AsApiError(error);
    if (told.status() == 500 && options.on_fault) options.on_fault(error.what());
    SetError(response, told);
  }
}

void Server::State::AnswerWhole(const Request& request, Response& response, ApiService::Job& job) {
  while (!job.generation->finished()) {
    if (const auto event = job.generation->Next(kPatience)) job.answer.Add(*event);
    if (!request.progress(0, 0)) {
      job.generation->Cancel();
      throw ApiError(503, "cancelled", "the client went away");
    }
  }
  SetJson(response, job.answer.Whole());
}

void Server::State::AnswerStream(const Request& request, Response& response, ApiService::Job job) {
  const auto shared = std::make_shared<ApiService::Job>(std::move(job));
  const auto client_is_there = request.progress;
  const auto send = [](httplib::DataSink& sink, const std::string& text) {
    return sink.write(text.data(), text.size());
  };
  const auto provide = [shared, client_is_there, send](size_t, httplib::DataSink& sink) {
    std::string text;
    try {
      if (shared->generation->finished()) {
        for (const OrderedJson& chunk : shared->answer.LastChunks()) text += StreamEvent(chunk);
      } else if (const auto event = shared->generation->Next(kPatience)) {
        for (const OrderedJson& chunk : shared->answer.Chunks(*event)) text += StreamEvent(chunk);
        return send(sink, text);
      } else {
        return client_is_there(0, 0);
      }
    } catch (const std::exception& error) {
      text += StreamEvent(ErrorJson(AsApiError(error)));
    }
    text += "data: [DONE]\n\n";
    if (!send(sink, text)) return false;
    sink.done();
    return true;
  };
  const auto release = [shared](bool) { shared->generation->Cancel(); };
  response.set_header("Cache-Control", "no-store");
  response.set_header("X-Accel-Buffering", "no");
  if (request.version == "HTTP/1.0") {
    response.set_content_provider("text/event-stream", provide, release);
  } else {
    response.set_chunked_content_provider("text/event-stream", provide, release);
  }
}

void Server::State::Answer(const Request& request, Response& response, ApiService::Job job) const {
  if (job.stream) {
    AnswerStream(request, response, std::move(job));
  } else {
    AnswerWhole(request, response, job);
  }
}

void Server::State::AddPost(const std::string& path,
                            std::function<void(const Request&, Response&, HeldBody&)> handler) {
  http.Post(path, [this, handler = std::move(handler)](const Request& request, Response& response,
                                                       const httplib::ContentReader& reader) {
    Guard(response, [&] {
      HeldBody body(body_budget);
      ReadBody(reader, body);
      response.status = 200;
      handler(request, response, body);
    });
  });
}

void Server::State::AddRoutes() {
  http.check = [this](const Request& request) { return Check(request); };
  http.set_pre_routing_handler([this](const Request& request, Response& response) {
    const std::optional<ApiError> problem = Check(request);
    AddCors(request, response);
    if (problem) {
      SetError(response, *problem);
      if (problem->status() == 405) {
        response.set_header("Allow", Endpoints().at(request.path));
      } else if (problem->status() == 401) {
        response.set_header("WWW-Authenticate", "Bearer");
      }
      return httplib::Server::HandlerResponse::Handled;
    }
    if (request.method != "OPTIONS") return httplib::Server::HandlerResponse::Unhandled;
    response.status = 204;
    return httplib::Server::HandlerResponse::Handled;
  });
  // What the library refuses by itself has no body yet.
  http.set_error_handler(httplib::Server::Handler([](const Request&, Response& response) {
    if (!response.body.empty()) return;
    SetError(response, ApiError(response.status, "bad_request", "the request is not valid HTTP"));
  }));
  http.set_logger([this](const Request& request, const Response& response) {
    const bool known = Endpoints().contains(request.path);
    metrics.CountRequest(known ? request.path : "other", response.status);
  });

  for (const char* path : {"/health", "/v1/health"}) {
    http.Get(path, [](const Request&, Response& r) { SetJson(r, {{"status", "ok"}}); });
  }
  http.Get("/", [](const Request&, Response& response) {
    response.set_header("Content-Security-Policy",
                        "default-src 'none'; script-src 'unsafe-inline'; style-src "
                        "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
                        "form-action 'none'; frame-ancestors 'none'");
    const std::string_view page = ChatPage();
    response.set_content(page.data(), page.size(), "text/html; charset=utf-8");
  });
  http.Get("/v1/models", [this](const Request&, Response& r) {
    Guard(r, [&] { SetJson(r, service.Models()); });
  });
  http.Get("/props", [this](const Request&, Response& r) {
    Guard(r, [&] { SetJson(r, service.Properties()); });
  });
  http.Get("/metrics", [this](const Request&, Response& r) {
    Guard(r, [&] { r.set_content(metrics.Text(), "text/plain; version=0.0.4; charset=utf-8"); });
  });
  AddPost("/v1/completions", [this](const Request& request, Response& r, HeldBody& body) {
    ApiService::Job job = service.StartCompletion(body.text());
    body.Release();  // an answer may take long
    Answer(request, r, std::move(job));
  });
  AddPost("/v1/chat/completions", [this](const Request& request, Response& r, HeldBody& body) {
    ApiService::Job job = service.StartChat(body.text());
    body.Release();
    Answer(request, r, std::move(job));
  });
  AddPost("/tokenize", [this](const Request&, Response& r, HeldBody& body) {
    SetJson(r, service.Tokenize(body.text(), [&](uint64_t bytes_for_each, uint64_t text_bytes) {
      Reserve(body, bytes_for_each, text_bytes);
    }));
  });
  AddPost("/detokenize", [this](const Request&, Response& r, HeldBody& body) {
    SetJson(r, service.Detokenize(body.text()));
  });
}

Server::Server(ServerOptions options, ApiService& service, Metrics& metrics)
    : state_(std::make_unique<State>(std::move(options), service, metrics)) {
  GuardedServer& http = state_->http;
  const auto threads = static_cast<size_t>(state_->options.max_connections + kSpareThreads);
  http.new_task_queue = [threads] { return new httplib::ThreadPool(threads); };
  http.set_payload_max_length(state_->options.max_body_bytes);
  http.set_tcp_nodelay(true);
  // Without SO_REUSEPORT, the library's default: two servers on one port would share its clients.
  http.set_socket_options([](socket_t socket) {
    const int yes = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  state_->AddRoutes();
}

Server::~Server() = default;

int Server::Bind() {
  const ServerOptions& options = state_->options;
  errno = 0;
  int port = options.port;
  if (port == 0) {
    port = state_->http.bind_to_any_port(options.host);
  } else if (!state_->http.bind_to_port(options.host, port)) {
    port = -1;
  }
  if (port <= 0) {
    throw RuntimeError(fmt::format("cannot listen on {} port {}: {}", options.host, options.port,
                                   errno != 0 ? std::strerror(errno) : "no such address"),
                       "choose another with --port (0: any that is free) or --host");
  }
  state_->http.WidenBacklog();
  return port;
}

void Server::Run() {
  state_->http.listen_after_bind();
}

void Server::BeginStop() {
  state_->http.stopping = true;
}

void Server::Stop() {
  state_->http.stopping = true;
  state_->http.abandoned = true;
  state_->http.stop();
}

}  // namespace winnow
