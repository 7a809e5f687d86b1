// Decides which files of a checkpoint folder are its weights: an index, model.safetensors, or what
// people have when neither is there. Looks at names only; opens nothing but the index.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"               // fs
#include "checkpoint/shard_index.h"  // ShardIndex

namespace winnow {

struct WeightFiles {
  std::vector<std::string> names;   // sorted; shard i of the checkpoint is names[i]
  std::optional<ShardIndex> index;  // its files are `names`
};

// Sorted names of the regular files and of the links to regular files in `folder`, hidden files
// left out. ModelError if it is no folder.
std::vector<std::string> ListFiles(const fs::path& folder);

// Throws ModelError if shards are missing or there are no safetensors weights; appends one sentence
// for each harmless oddity.
WeightFiles FindWeightFiles(const fs::path& folder, const std::vector<std::string>& files,
                            std::vector<std::string>& findings);

// Weights in any format by the file's name, with their indexes: such a file is never carried into a
// rewritten checkpoint, where it would hold weights that no longer fit.
bool IsWeightFileName(std::string_view name);

}  // namespace winnow
