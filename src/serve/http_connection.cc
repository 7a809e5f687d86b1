#include "serve/http_connection.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace winnow {
namespace {

// How long a wait may overlook that the server stops.
constexpr std::chrono::milliseconds kSlice{100};
constexpr size_t kBufferBytes = 16 << 10;
constexpr std::chrono::milliseconds kLingerTime{1'000};

}  // namespace

HttpConnection::HttpConnection(int socket, const ConnectionLimits& limits,
                               const std::atomic<bool>& abandoned)
    : socket_(socket), limits_(limits), abandoned_(abandoned), buffer_(kBufferBytes) {}

bool HttpConnection::Wait(short events, Clock::time_point deadline) const {
  while (!abandoned_) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
    if (left.count() <= 0) return false;
    pollfd watched{socket_, events, 0};
    const int ready = poll(&watched, 1, static_cast<int>(std::min(left, kSlice).count()));
    if (ready > 0) return true;  // errors too: the call that follows reports them
    if (ready < 0 && errno != EINTR) return false;
  }
  return false;
}

bool HttpConnection::WaitForRequest(const std::atomic<bool>& stopping) {
  if (buffer_begin_ < buffer_end_) return true;
  const auto deadline = Clock::now() + limits_.idle_time;
  while (!stopping && Clock::now() < deadline) {
    if (Wait(POLLIN, std::min(deadline, Clock::now() + kSlice))) return ClientIsThere();
    if (abandoned_) return false;
  }
  return false;
}

void HttpConnection::BeginHead() {
  in_head_ = true;
  head_bytes_ = 0;
  deadline_ = Clock::now() + limits_.head_time;
}

void HttpConnection::BeginBody() {
  in_head_ = false;
  deadline_ = Clock::now() + limits_.body_time;
}

bool HttpConnection::ClientIsThere() const {
  char byte = 0;
  const ssize_t got = recv(socket_, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
  return got > 0 || (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR));
}

bool HttpConnection::is_readable() const {
  return buffer_begin_ < buffer_end_ || Wait(POLLIN, deadline_);
}

bool HttpConnection::is_writable() const {
  return ClientIsThere() && Wait(POLLOUT, Clock::now() + limits_.write_time);
}

ssize_t HttpConnection::read(char* to, size_t size) {
  if (broken_) return -1;
  if (in_head_ && head_bytes_ >= limits_.head_bytes) {
    broken_ = head_too_long_ = true;
    return -1;
  }
  if (buffer_begin_ == buffer_end_) {
    ssize_t got = -1;
    do {
      if (!Wait(POLLIN, deadline_)) break;
      got = recv(socket_, buffer_.data(), buffer_.size(), MSG_DONTWAIT);
    } while (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR));
    if (got <= 0) {
      broken_ = true;
      return got;
    }
    buffer_begin_ = 0;
    buffer_end_ = static_cast<size_t>(got);
  }
  const size_t count = std::min(size, buffer_end_ - buffer_begin_);
  std::memcpy(to, buffer_.data() + buffer_begin_, count);
  buffer_begin_ += count;
  if (in_head_) head_bytes_ += count;
  return static_cast<ssize_t>(count);
}

ssize_t HttpConnection::write(const char* from, size_t size) {
  size_t sent = 0;
  while (sent < size) {
    if (!Wait(POLLOUT, Clock::now() + limits_.write_time)) return -1;
    const ssize_t count = send(socket_, from + sent, size - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return -1;
    if (count > 0) sent += static_cast<size_t>(count);
  }
  return static_cast<ssize_t>(sent);
}

void HttpConnection::Linger() {
  shutdown(socket_, SHUT_WR);
  const auto deadline = Clock::now() + kLingerTime;
  while (Wait(POLLIN, deadline)) {
    const ssize_t got = recv(socket_, buffer_.data(), buffer_.size(), MSG_DONTWAIT);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) return;
  }
}

void HttpConnection::get_remote_ip_and_port(std::string& ip, int& port) const {
  ip.clear();
  port = 0;
}

void HttpConnection::get_local_ip_and_port(std::string& ip, int& port) const {
  ip.clear();
  port = 0;
}

}  // namespace winnow
