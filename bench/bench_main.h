// What every benchmark's main does: an exception becomes a line and an exit code.
#pragma once

#include <cstdio>
#include <exception>

#include "base/error.h"  // Error

namespace winnow {

inline int RunBenchmark(int (*run)(int, char**), int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    if (!error.hint().empty()) std::fprintf(stderr, "hint: %s\n", error.hint().c_str());
    return static_cast<int>(error.exit_code());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

}  // namespace winnow
