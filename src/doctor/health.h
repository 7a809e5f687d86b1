// Health checks of what a user has: the machine, or a file or folder. Findings are sentences;
// damage that makes something unusable is thrown as ModelError by the readers themselves.
#pragma once

#include <string>
#include <vector>

#include "base/file.h"         // fs
#include "base/progress.h"     // JobControl
#include "base/thread_pool.h"  // ThreadPool

namespace winnow {

struct HealthReport {
  std::string subject;                // "model", "safetensors file", "tokenizer", "machine"
  std::vector<std::string> facts;     // what it is
  std::vector<std::string> findings;  // what is odd about it
};

// A model folder, a folder with just a tokenizer, a .safetensors file, a tokenizer.json, a plan or
// a statistics folder. Reads every weight once (`scan_weights`) and counts NaN and Inf, all-zero
// tensors and dead router rows.
HealthReport CheckPath(const fs::path& path, bool scan_weights, ThreadPool& pool,
                       const JobControl& control);
// CPU features and kernels, memory, disk.
HealthReport CheckMachine(const fs::path& working_folder);

}  // namespace winnow
