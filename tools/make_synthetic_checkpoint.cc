// Writes a checkpoint with the shape of a published model and pseudo-random weights, at about the
// speed of the disk: for measuring memory and reading, not for reading what it says.
// The same options give the same bytes on every machine.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <array>
#include <chrono>
#include <cmath>
#include <optional>
#include <string_view>

#include "base/error.h"                     // Error
#include "base/file.h"                      // File
#include "base/units.h"                     // FormatBytes
#include "checkpoint/safetensors_writer.h"  // LayOutSafetensors
#include "synthetic_shapes.h"               // Shape

namespace winnow::tools {
namespace {

constexpr size_t kChunkBytes = size_t{8} << 20;
// Of weights as trained models have them; their norms lie around 1.
constexpr double kWeightDeviation = 0.02;
constexpr double kNormDeviation = 0.05;

// 2^16 equally probable values of a normal distribution as bf16, so that one draw is one lookup.
using NormalTable = std::array<uint16_t, 65536>;

// Inverse of the normal distribution by bisection on erf: slow, exact enough, used 65,536 times.
double NormalQuantile(double probability) {
  double low = -6.0;
  double high = 6.0;
  for (int step = 0; step < 50; ++step) {
    const double middle = (low + high) / 2;
    (0.5 * std::erfc(-middle / std::sqrt(2.0)) < probability ? low : high) = middle;
  }
  return (low + high) / 2;
}

NormalTable MakeTable(double mean, double deviation) {
  NormalTable table;
  for (size_t i = 0; i < table.size(); ++i) {
    const double probability = (static_cast<double>(i) + 0.5) / static_cast<double>(table.size());
    table[i] = Bf16FromFloat(static_cast<float>(mean + deviation * NormalQuantile(probability)));
  }
  return table;
}

// splitmix64: four draws from each state.
uint64_t NextRandom(uint64_t& state) {
  state += 0x9e3779b97f4a7c15u;
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// FNV-1a.
uint64_t HashName(std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

void FillNormal(const NormalTable& table, uint64_t& state, std::span<uint16_t> out) {
  size_t i = 0;
  for (; i + 4 <= out.size(); i += 4) {
    const uint64_t bits = NextRandom(state);
    out[i] = table[bits & 0xffff];
    out[i + 1] = table[(bits >> 16) & 0xffff];
    out[i + 2] = table[(bits >> 32) & 0xffff];
    out[i + 3] = table[bits >> 48];
  }
  for (; i < out.size(); ++i) out[i] = table[NextRandom(state) & 0xffff];
}

struct Options {
  Shape shape;
  fs::path output;
  uint64_t shard_bytes = 4'000'000'000;
  uint64_t seed = 1;
  int64_t num_ids = 0;
  int64_t block = 512;
};

std::vector<std::vector<TensorInfo>> CutIntoShards(std::vector<TensorInfo> tensors,
                                                   uint64_t shard_bytes) {
  std::vector<std::vector<TensorInfo>> shards(1);
  uint64_t used = 0;
  for (TensorInfo& tensor : tensors) {
    if (used > 0 && used + tensor.bytes > shard_bytes) {
      shards.emplace_back();
      used = 0;
    }
    used += tensor.bytes;
    shards.back().push_back(std::move(tensor));
  }
  return shards;
}

class Writer {
 public:
  explicit Writer(const Options& options)
      : options_(options),
        weights_(MakeTable(0.0, kWeightDeviation)),
        norms_(MakeTable(1.0, kNormDeviation)),
        chunk_(kChunkBytes / sizeof(uint16_t)) {}

  uint64_t WriteAll() {
    fs::create_directories(options_.output);
    std::vector<TensorInfo> tensors = ListTensors(options_.shape);
    uint64_t total = 0;
    for (const TensorInfo& tensor : tensors) total += tensor.bytes;
    RequireDiskSpace(options_.output, total, "the checkpoint");
    std::vector<std::vector<TensorInfo>> shards =
        CutIntoShards(std::move(tensors), options_.shard_bytes);
    OrderedJson weight_map = OrderedJson::object();
    for (size_t i = 0; i < shards.size(); ++i) {
      const std::string name = shards.size() == 1 ? "model.safetensors"
                                                  : fmt::format("model-{:05}-of-{:05}.safetensors",
                                                                i + 1, shards.size());
      WriteShard(options_.output / name, shards[i]);
      for (const TensorInfo& tensor : shards[i]) weight_map[tensor.name] = name;
    }
    if (shards.size() > 1) {
      const OrderedJson index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
      WriteFileAtomically(options_.output / "model.safetensors.index.json", index.dump(2) + "\n");
    }
    WriteFileAtomically(options_.output / "config.json", MakeConfig(options_.shape).dump(2) + "\n");
    if (options_.num_ids > 0) WriteIds();
    return total;
  }

 private:
  void WriteShard(const fs::path& path, std::vector<TensorInfo>& tensors) {
    const std::string header = LayOutSafetensors(tensors, {{"format", "pt"}});
    const File file = File::Create(path);
    file.WriteAt(0, std::as_bytes(std::span(header)));
    for (const TensorInfo& tensor : tensors) {
      // Seeded by the name alone: a tensor does not change when layers or experts are added.
      uint64_t state = options_.seed * 0x9e3779b97f4a7c15u ^ HashName(tensor.name);
      const bool is_norm = tensor.name.find("norm") != std::string::npos;
      for (uint64_t done = 0; done < tensor.bytes;) {
        const uint64_t bytes = std::min<uint64_t>(kChunkBytes, tensor.bytes - done);
        const std::span<uint16_t> values(chunk_.data(), bytes / sizeof(uint16_t));
        FillNormal(is_norm ? norms_ : weights_, state, values);
        file.WriteAt(tensor.file_offset + done, std::as_bytes(values));
        done += bytes;
      }
    }
  }

  // Token ids that any text source accepts: input_ids I64 [blocks, block].
  void WriteIds() {
    const int64_t blocks = std::max<int64_t>(1, options_.num_ids / options_.block);
    std::vector<int64_t> ids(static_cast<size_t>(blocks * options_.block));
    uint64_t state = options_.seed;
    for (int64_t& id : ids) {
      id = static_cast<int64_t>(NextRandom(state) % static_cast<uint64_t>(options_.shape.vocab));
    }
    const TensorData tensor = {
        .name = "input_ids",
        .dtype = Dtype::kI64,
        .shape = {static_cast<uint64_t>(blocks), static_cast<uint64_t>(options_.block)},
        .data = std::as_bytes(std::span(ids))};
    WriteSafetensors(options_.output / "ids.safetensors", std::span(&tensor, 1));
  }

  const Options& options_;
  const NormalTable weights_;
  const NormalTable norms_;
  std::vector<uint16_t> chunk_;
};

int Run(int argc, char** argv) {
  CLI::App app("Writes a checkpoint of pseudo-random weights in the shape of a published model.");
  Options options;
  std::string family = "olmoe";
  app.add_option("--family", family, "mixtral, olmoe (default), qwen2_moe, qwen3_moe, deepseek");
  std::string shard = "4000000000";
  app.add_option("--shard-size", shard, "largest weight file (default 4000000000)");
  app.add_option("--seed", options.seed, "of the weights and ids (default 1)");
  app.add_option("--ids", options.num_ids, "also write ids.safetensors with so many random ids");
  app.add_option("--block", options.block, "ids in a row (default 512)")
      ->check(CLI::PositiveNumber);
  app.add_option("-o,--output", options.output, "folder to write")->required();
  // Sizes not given stay those of the published model.
  struct Size {
    const char* flag;
    int64_t Shape::*field;
  };
  constexpr std::array kSizes = {Size{"--hidden", &Shape::hidden},
                                 Size{"--layers", &Shape::layers},
                                 Size{"--heads", &Shape::heads},
                                 Size{"--kv-heads", &Shape::kv_heads},
                                 Size{"--head-dim", &Shape::head_dim},
                                 Size{"--vocab", &Shape::vocab},
                                 Size{"--experts", &Shape::experts},
                                 Size{"--top-k", &Shape::experts_per_token},
                                 Size{"--expert-width", &Shape::expert_width},
                                 Size{"--shared-width", &Shape::shared_width},
                                 Size{"--dense-width", &Shape::dense_width},
                                 Size{"--dense-layers", &Shape::dense_layers},
                                 Size{"--positions", &Shape::positions}};
  std::array<std::optional<int64_t>, kSizes.size()> given;
  for (size_t i = 0; i < kSizes.size(); ++i) app.add_option(kSizes[i].flag, given[i]);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : static_cast<int>(ExitCode::kUsage);
  }
  options.shape = PublishedShape(family);
  for (size_t i = 0; i < kSizes.size(); ++i) {
    if (given[i].has_value()) options.shape.*kSizes[i].field = *given[i];
  }
  options.shard_bytes = ParseBytes(shard, "--shard-size");
  CheckShape(options.shape);
  const auto start = std::chrono::steady_clock::now();
  const uint64_t total = Writer(options).WriteAll();
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  fmt::print("{}: {} in {:.1f} s ({:.0f} MB/s)\n", options.output.string(), FormatBytes(total),
             seconds, static_cast<double>(total) / 1e6 / seconds);
  return 0;
}

}  // namespace
}  // namespace winnow::tools

int main(int argc, char** argv) {
  try {
    return winnow::tools::Run(argc, argv);
  } catch (const winnow::Error& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    if (!error.hint().empty()) fmt::print(stderr, "hint: {}\n", error.hint());
    return static_cast<int>(error.exit_code());
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return 1;
  }
}
