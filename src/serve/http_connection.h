// A client's connection as httplib reads and writes it, with the bounds that the library lacks: on
// the bytes and the time of a request's head, on the time of its body, on a reader that does not
// read; and with a way to end all of it when the server stops.
#pragma once

#include <httplib.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <string>
#include <vector>

namespace winnow {

struct ConnectionLimits {
  size_t head_bytes = 32 << 10;
  std::chrono::milliseconds head_time{10'000};
  std::chrono::milliseconds body_time{60'000};
  std::chrono::milliseconds write_time{30'000};  // without any progress
  std::chrono::milliseconds idle_time{15'000};   // between requests
};

class HttpConnection : public httplib::Stream {
 public:
  // Does not own the socket. `abandoned` ends every wait.
  HttpConnection(int socket, const ConnectionLimits& limits, const std::atomic<bool>& abandoned);

  // Waits for the first byte of a request; false if none comes, the client is gone, or `stopping`.
  bool WaitForRequest(const std::atomic<bool>& stopping);
  void BeginHead();
  void BeginBody();
  // False once the client has closed its side.
  bool ClientIsThere() const;
  // Reading failed or ran into a bound: nothing sensible can follow.
  bool broken() const { return broken_; }
  bool head_too_long() const { return head_too_long_; }
  // Sends what is left and gives the client a moment to read it, although its request was not read
  // to the end; closing at once would let the kernel discard the answer.
  void Linger();

  bool is_readable() const override;
  bool is_writable() const override;
  ssize_t read(char* to, size_t size) override;
  ssize_t write(const char* from, size_t size) override;
  void get_remote_ip_and_port(std::string& ip, int& port) const override;
  void get_local_ip_and_port(std::string& ip, int& port) const override;
  int socket() const override { return socket_; }

 private:
  using Clock = std::chrono::steady_clock;
  bool Wait(short events, Clock::time_point deadline) const;

  const int socket_;
  const ConnectionLimits& limits_;
  const std::atomic<bool>& abandoned_;
  std::vector<char> buffer_;
  size_t buffer_begin_ = 0, buffer_end_ = 0;
  bool in_head_ = true, broken_ = false, head_too_long_ = false;
  size_t head_bytes_ = 0;
  Clock::time_point deadline_;
};

}  // namespace winnow
