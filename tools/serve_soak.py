#!/usr/bin/env python3
"""Many clients of all kinds at a running `winnow serve`, for a while: standard library only.

    python3 tools/serve_soak.py http://127.0.0.1:8080 --pid PID [--clients 16] [--seconds 60]

Good clients stream or wait for answers with fixed seeds, and every answer must equal the one that a single client got
before the crowd came. Others read slowly, send too much, send nonsense, or vanish. Counts status codes, samples the
server's resident memory, and at the end asks whether the server is idle again. Exit 1 on any violation.
"""
import argparse
import collections
import http.client
import json
import random
import socket
import sys
import threading
import time
import urllib.parse

CASES = [{"prompt": prompt, "max_tokens": tokens, "seed": seed, "temperature": temperature}
         for prompt, tokens, seed, temperature in (
             ("The old house", 16, 1, 1.0), ("The old house by the sea", 24, 2, 0.8), ("def main():", 8, 3, 0),
             ("Once upon a time there was a fox who", 32, 4, 1.0), ("1 + 1 =", 4, 5, 0), ("In the beginning", 20, 6, 0.5))]


class Soak:
    def __init__(self, arguments):
        url = urllib.parse.urlparse(arguments.url)
        self.address = (url.hostname, url.port)
        self.arguments = arguments
        self.lock = threading.Lock()
        self.counts = collections.Counter()
        self.violations = []
        self.expected = {}
        self.end = 0.0

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def fault(self, what):
        with self.lock:
            self.violations.append(what)

    def request(self, method, path, body=None, timeout=120):
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        connection.request(method, path, body=body, headers={"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def complete(self, case, stream):
        connection, response = self.request("POST", "/v1/completions", json.dumps({**case, "stream": stream}))
        try:
            data = response.read().decode("utf-8")
            if response.status != 200:
                return response.status, None
            if not stream:
                return 200, json.loads(data)["choices"][0]["text"]
            events = [line[6:] for line in data.split("\n\n") if line]
            if events[-1] != "[DONE]":
                return 200, "(the stream has no end)"
            return 200, "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        finally:
            connection.close()

    def good(self, rng):
        index = rng.randrange(len(CASES))
        status, text = self.complete(CASES[index], rng.random() < 0.5)
        self.count(f"good {status}")
        if status == 200 and text != self.expected[index]:
            self.fault(f"case {index}: {text!r} instead of {self.expected[index]!r}")
        if status not in (200, 429, 503):
            self.fault(f"case {index}: status {status}")
        if status == 429:
            time.sleep(0.05)

    def slow(self, rng):
        connection, response = self.request("POST", "/v1/completions", json.dumps({**CASES[3], "stream": True}))
        while response.read(16):
            time.sleep(rng.random() * 0.05)
        connection.close()
        self.count(f"slow {response.status}")

    def oversized(self, rng):
        body = json.dumps({"prompt": "x" * rng.choice((1 << 16, 20 << 20))})
        try:
            connection, response = self.request("POST", "/v1/completions", body)
            response.read()
            connection.close()
            self.count(f"oversized {response.status}")
            if response.status not in (400, 413, 429, 503):
                self.fault(f"oversized: status {response.status}")
        except (ConnectionError, http.client.HTTPException):
            self.count("oversized, cut")

    def malformed(self, rng):
        body = rng.choice((b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "a", "other": 1}', b"\xff\xfe", b'{"prompt": [-1]}'))
        connection, response = self.request("POST", "/v1/completions", body)
        error = json.loads(response.read())["error"]
        connection.close()
        self.count(f"malformed {response.status}")
        if response.status not in (400, 503) or "message" not in error:
            self.fault(f"malformed {body!r}: status {response.status}")

    def garbage(self, rng):
        with socket.create_connection(self.address, timeout=30) as raw:
            raw.sendall(bytes(rng.randrange(256) for _ in range(200)) + b"\r\n\r\n")
            try:
                while raw.recv(4096):
                    pass
            except ConnectionError:
                pass
        self.count("garbage")

    def vanishing(self, rng):
        body = json.dumps({**CASES[3], "max_tokens": 500, "stream": rng.random() < 0.5})
        with socket.create_connection(self.address, timeout=30) as raw:
            raw.sendall(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            time.sleep(rng.random() * 0.3)
        self.count("vanished")

    def health(self, _):
        start = time.monotonic()
        connection, response = self.request("GET", "/health", timeout=30)
        response.read()
        connection.close()
        self.count(f"health {response.status}")
        with self.lock:
            self.counts["slowest health, ms"] = max(self.counts["slowest health, ms"], int(1000 * (time.monotonic() - start)))

    def client(self, seed):
        rng = random.Random(seed)
        kinds = [self.good] * 8 + [self.slow, self.oversized, self.malformed, self.garbage, self.vanishing, self.health]
        while time.monotonic() < self.end:
            kind = rng.choice(kinds)
            try:
                kind(rng)
            except Exception as error:  # noqa: BLE001: whatever it is, it is a finding
                self.fault(f"{kind.__name__}: {error!r}")

    def resident(self):
        if not self.arguments.pid:
            return 0
        for line in open(f"/proc/{self.arguments.pid}/status", encoding="ascii"):
            if line.startswith("VmRSS"):
                return int(line.split()[1]) // 1024
        return 0

    def metric(self, name):
        connection, response = self.request("GET", "/metrics")
        text = response.read().decode()
        connection.close()
        return next(float(line.split()[1]) for line in text.split("\n") if line.startswith(f"winnow_{name} "))

    def run(self):
        for index, case in enumerate(CASES):
            self.expected[index] = self.complete(case, False)[1]
        before = self.resident()
        self.end = time.monotonic() + self.arguments.seconds
        threads = [threading.Thread(target=self.client, args=(seed,)) for seed in range(self.arguments.clients)]
        for thread in threads:
            thread.start()
        samples = []
        while any(thread.is_alive() for thread in threads):
            samples.append(self.resident())
            time.sleep(0.5)
        for _ in range(200):  # the last vanished clients are noticed within moments
            if self.metric("running_sequences") == 0 and self.metric("queued_requests") == 0:
                break
            time.sleep(0.1)
        else:
            self.fault("the server is still busy although every client has gone")
        for index, case in enumerate(CASES):
            if self.complete(case, False)[1] != self.expected[index]:
                self.fault(f"case {index} differs after the crowd has gone")
        for name in sorted(self.counts):
            print(f"{name:>24}: {self.counts[name]}")
        if samples and self.arguments.pid:
            half = len(samples) // 2
            print(f"resident MiB: {before} before, {max(samples[:half] or samples)} in the first half, "
                  f"{max(samples[half:])} in the second, {samples[-1]} at the end")
        for violation in self.violations[:20]:
            print("VIOLATION", violation)
        print(f"{len(self.violations)} violations")
        return 1 if self.violations else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, default=0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    return Soak(parser.parse_args()).run()


if __name__ == "__main__":
    sys.exit(main())
