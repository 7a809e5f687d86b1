#include "observe/stats_merge.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/error.h"
#include "observe/layer_stats.h"

namespace winnow {
namespace {

// Everything but the sources must agree.
std::string Essence(StatsInfo info) {
  info.sources.clear();
  return StatsInfoToJson(info).dump();
}

void CopyTensor(const SafetensorsFile& from, const std::string& name, const std::string& new_name,
                uint64_t row_offset, LayerStatsWriter& writer) {
  const TensorInfo& tensor = from.Get(name);
  std::vector<std::byte> buffer(static_cast<size_t>(std::min(tensor.bytes, kMergeBufferBytes)));
  for (uint64_t done = 0; done < tensor.bytes;) {
    const std::span<std::byte> part = std::span(buffer).first(
        static_cast<size_t>(std::min<uint64_t>(buffer.size(), tensor.bytes - done)));
    from.ReadPart(tensor, done, part);
    writer.WriteBytes(new_name, row_offset + done, part);
    done += part.size();
  }
}

}  // namespace

uint64_t MergeListBytes(const std::vector<StatsInfo>& parts) {
  constexpr uint64_t kTensorsOfSource = 8, kTensorEntryBytes = 512;
  uint64_t bytes = 0;
  for (const StatsInfo& part : parts) {
    bytes += (part.sources.size() + 1) * kTensorsOfSource * kTensorEntryBytes;
    for (const StatsSource& source : part.sources) {
      bytes += source.lengths.size() * sizeof(source.lengths.front()) * 2;
    }
  }
  return bytes;
}

StatsInfo MergedInfo(const std::vector<StatsInfo>& parts) {
  StatsInfo merged = parts.front();
  if (merged.progressive_keep) {
    throw UsageError("progressive statistics cannot be merged",
                     "give all texts to one observe run with several --calib");
  }
  std::set<std::string> seen;
  merged.sources.clear();
  for (const StatsInfo& part : parts) {
    if (part.model_fingerprint != merged.model_fingerprint) {
      throw UsageError("the statistics are of different models");
    }
    if (Essence(part) != Essence(merged)) {
      throw UsageError(
          "the statistics were gathered with different levels, batches or compute modes",
          "observe again with the same flags");
    }
    for (const StatsSource& source : part.sources) {
      if (!seen.insert(source.fingerprint).second) {
        throw UsageError(fmt::format("the text \"{}\" is in two of the statistics", source.name),
                         "it would count twice; leave one out");
      }
      merged.sources.push_back(source);
    }
  }
  return merged;
}

void MergeStats(const std::vector<fs::path>& parts, const fs::path& output,
                const JobControl& control) {
  std::vector<StatsInfo> infos;
  for (const fs::path& part : parts) infos.push_back(ReadStatsInfo(part));
  const StatsInfo merged = MergedInfo(infos);
  RequireDiskSpace(output, StatsBytes(merged), "the merged statistics");
  const fs::path folder = output.string() + ".partial";
  fs::remove_all(folder);
  fs::create_directories(folder);
  for (const StatsLayer& layer : merged.layers) {
    LayerStatsWriter writer(folder, merged, layer);
    int64_t first_token = 0;
    size_t first_source = 0;
    for (size_t p = 0; p < parts.size(); ++p) {
      control.Poll();
      const LayerStatsReader reader(parts[p], infos[p], layer);
      for (const TensorInfo& tensor : reader.file().tensors()) {
        if (tensor.name == "weight_flatness") {  // of the model, the same in every part
          if (p == 0) CopyTensor(reader.file(), tensor.name, tensor.name, 0, writer);
        } else if (tensor.name.rfind("sums.", 0) != 0) {
          const uint64_t row_bytes = tensor.shape[0] == 0 ? 0 : tensor.bytes / tensor.shape[0];
          CopyTensor(reader.file(), tensor.name, tensor.name,
                     static_cast<uint64_t>(first_token) * row_bytes, writer);
        }
      }
      for (size_t s = 0; s < infos[p].sources.size(); ++s) {
        const std::string prefix = fmt::format("sums.{}.", s);
        for (const TensorInfo& tensor : reader.file().tensors()) {
          if (tensor.name.rfind(prefix, 0) != 0) continue;
          CopyTensor(reader.file(), tensor.name,
                     fmt::format("sums.{}.{}", first_source + s, tensor.name.substr(prefix.size())),
                     0, writer);
        }
      }
      first_token += infos[p].num_tokens();
      first_source += infos[p].sources.size();
    }
    writer.Finish();
  }
  WriteFileAtomically(folder / "stats.json", StatsInfoToJson(merged).dump(1) + "\n");
  fs::remove_all(output);
  RenameDurably(folder, output);
}

}  // namespace winnow
