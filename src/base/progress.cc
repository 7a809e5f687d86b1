#include "base/progress.h"

#include "base/error.h"

namespace winnow {

void JobControl::Poll() const {
  if (interrupted != nullptr && interrupted->load(std::memory_order_relaxed)) {
    throw InterruptedError("interrupted; finished layers are kept",
                           "run the same command with --resume to go on");
  }
}

}  // namespace winnow
