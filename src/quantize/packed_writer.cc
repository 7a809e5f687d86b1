#include "quantize/packed_writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <system_error>
#include <tuple>
#include <vector>

#include "apply/model_card.h"
#include "base/error.h"
#include "checkpoint/shard_index.h"
#include "model/quantization_config.h"
#include "quantize/packed_layout.h"

namespace winnow {
namespace {

constexpr uint64_t kAuditBytes = uint64_t{64} << 10;

// A tensor that is made here, and what of it was handed over.
struct Made {
  const PackedTensor* tensor = nullptr;
  size_t shard = 0;
  uint64_t written = 0;              // bytes, from the start
  std::vector<std::byte> head = {};  // the first and the last bytes, to compare with at the end
  std::vector<std::byte> tail = {};  // of all but padding
};

using Key = std::tuple<int64_t, int64_t, PackedMatrix>;  // layer, expert (-1: none), matrix

Key KeyOf(int64_t layer, int64_t expert, PackedMatrix matrix) {
  return {matrix == PackedMatrix::kLmHead ? -1 : layer, expert, matrix};
}

void KeepEnds(Made& made, std::span<const std::byte> bytes) {
  const size_t head = std::min<size_t>(bytes.size(), kAuditBytes - made.head.size());
  made.head.insert(made.head.end(), bytes.begin(),
                   bytes.begin() + static_cast<std::ptrdiff_t>(head));
  const size_t tail = std::min<size_t>(bytes.size(), kAuditBytes);
  made.tail.insert(made.tail.end(), bytes.end() - static_cast<std::ptrdiff_t>(tail), bytes.end());
  if (made.tail.size() > kAuditBytes) {
    made.tail.erase(made.tail.begin(), made.tail.end() - static_cast<std::ptrdiff_t>(kAuditBytes));
  }
}

}  // namespace

struct PackedCheckpointWriter::State {
  State(const Model& m, QuantizePlan p, const fs::path& o)
      : model(m), plan(std::move(p)), out(o), folder(o.string() + ".partial") {}
  ~State() {
    files.clear();
    std::error_code ignored;
    if (owns_folder) fs::remove_all(folder, ignored);
  }

  Made& Find(int64_t layer, int64_t expert, PackedMatrix matrix) {
    const auto it = made.find(KeyOf(layer, expert, matrix));
    if (it == made.end()) {
      throw RuntimeError(
          fmt::format("layer {}: a matrix was quantised that the plan keeps", layer));
    }
    return it->second;
  }
  void Append(Made& to, std::span<const std::byte> bytes) {
    files[to.shard].WriteAt(to.tensor->info.file_offset + to.written, bytes);
    to.written += bytes.size();
    KeepEnds(to, bytes);
  }
  void CreateFiles();
  void CopyTensors(const JobControl& control);
  void WriteFiles(const std::string& card, const OrderedJson& record);
  void RequireComplete() const;
  int64_t Audit() const;
  void AuditCopy(const PackedTensor& tensor, const TensorInfo& found, const Model& written) const;

  const Model& model;
  const QuantizePlan plan;
  const fs::path out, folder;
  bool owns_folder = false;
  std::vector<PackedShard> shards;
  std::vector<File> files;
  std::map<Key, Made> made;
};

void PackedCheckpointWriter::State::CreateFiles() {
  fs::remove_all(folder);
  uint64_t total = 0;
  for (const PackedShard& shard : shards) total += shard.bytes;
  RequireDiskSpace(out, total, "the new checkpoint");
  fs::create_directories(folder);
  owns_folder = true;
  for (size_t i = 0; i < shards.size(); ++i) {
    const PackedShard& shard = shards[i];
    files.push_back(File::Create(folder / shard.file_name));
    files.back().WriteAt(0, std::as_bytes(std::span(shard.header)));
    files.back().Truncate(shard.bytes);  // what is never written, padding, reads as zeros
    for (const PackedTensor& tensor : shard.tensors) {
      if (tensor.source != nullptr) continue;
      made[KeyOf(tensor.layer, tensor.expert, tensor.matrix)] = {.tensor = &tensor, .shard = i};
    }
  }
}

void PackedCheckpointWriter::State::RequireComplete() const {
  for (const auto& [key, each] : made) {
    const PackedTensor& tensor = *each.tensor;
    // An extent is written whole or not at all; a matrix has no padding.
    if (tensor.expert >= 0 ? each.written > 0 : each.written == tensor.info.bytes) continue;
    throw RuntimeError(fmt::format("tensor {} was not written: {} of {} bytes", tensor.info.name,
                                   each.written, tensor.info.bytes));
  }
}

void PackedCheckpointWriter::State::CopyTensors(const JobControl& control) {
  uint64_t total = 0, done = 0;
  for (const PackedShard& shard : shards) {
    for (const PackedTensor& tensor : shard.tensors) total += tensor.source_bytes;
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    for (const PackedTensor& tensor : shards[i].tensors) {
      if (tensor.source == nullptr) continue;
      control.Poll();
      const auto source = static_cast<size_t>(tensor.source->shard);
      files[i].CopyFrom(model.checkpoint().shards()[source].file(),
                        tensor.source->file_offset + tensor.source_offset, tensor.info.file_offset,
                        tensor.source_bytes);
      done += tensor.source_bytes;
      control.Report({.stage = "copy",
                      .work_done = static_cast<int64_t>(done),
                      .work_total = static_cast<int64_t>(total),
                      .bytes = true});
    }
    control.Poll();
    files[i].Sync();
  }
}

void PackedCheckpointWriter::State::WriteFiles(const std::string& card, const OrderedJson& record) {
  const Checkpoint& checkpoint = model.checkpoint();
  for (const fs::path& file : checkpoint.OtherFiles()) {
    fs::create_directories((folder / file).parent_path());
    fs::copy_file(checkpoint.folder() / file, folder / file, fs::copy_options::overwrite_existing);
  }
  const QuantizePlan stored = StoredFormats(model, plan);
  const OrderedJson config = ConfigWithFormats(checkpoint.config(), stored.layers, stored.lm_head);
  WriteFileAtomically(folder / "config.json", config.dump(2) + "\n");
  if (shards.size() > 1) {
    uint64_t total = 0;
    Json map = Json::object();
    for (const PackedShard& shard : shards) {
      for (const PackedTensor& tensor : shard.tensors) {
        total += tensor.info.bytes;
        map[tensor.info.name] = shard.file_name;
      }
    }
    const Json index = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
    WriteFileAtomically(folder / kShardIndexName, index.dump(2) + "\n");
  }
  WriteFileAtomically(folder / "winnow-quantize.json", record.dump(1) + "\n");
  // A card of an earlier step, say of pruning, stays below this one.
  const std::string name = CardFileName(checkpoint);
  const fs::path earlier = checkpoint.folder() / name;
  std::string text = "# A quantised Mixture-of-Experts checkpoint\n\n" + card;
  if (fs::exists(earlier)) text += "\n---\n\n" + ReadTextFile(earlier);
  WriteFileAtomically(folder / name, text);
}

void PackedCheckpointWriter::State::AuditCopy(const PackedTensor& tensor, const TensorInfo& found,
                                              const Model& written) const {
  const uint64_t bytes = std::min(tensor.source_bytes, kAuditBytes);
  std::vector<std::byte> expected(bytes), got(bytes);
  for (const uint64_t at : {uint64_t{0}, tensor.source_bytes - bytes}) {
    model.checkpoint().ReadPart(*tensor.source, tensor.source_offset + at, expected);
    written.checkpoint().ReadPart(found, at, got);
    if (expected == got) continue;
    throw ModelError(fmt::format("{}: tensor {} differs from its source after writing",
                                 folder.string(), tensor.info.name),
                     "the disk may be failing; run again with --force");
  }
}

int64_t PackedCheckpointWriter::State::Audit() const {
  const Model written = Model::Open(folder);
  int64_t audited = 0;
  for (const PackedShard& shard : shards) {
    for (const PackedTensor& tensor : shard.tensors) {
      const TensorInfo* found = written.checkpoint().Find(tensor.info.name);
      if (found == nullptr || found->bytes != tensor.info.bytes) {
        throw ModelError(fmt::format("{}: tensor {} is not what was written", folder.string(),
                                     tensor.info.name));
      }
      if (tensor.source != nullptr) AuditCopy(tensor, *found, written);
      ++audited;
    }
  }
  for (const auto& [key, each] : made) {
    const TensorInfo* found = written.checkpoint().Find(each.tensor->info.name);
    std::vector<std::byte> head(each.head.size()), tail(each.tail.size());
    written.checkpoint().ReadPart(*found, 0, head);
    written.checkpoint().ReadPart(*found, each.written - tail.size(), tail);
    if (head != each.head || tail != each.tail) {
      throw ModelError(fmt::format("{}: tensor {} differs from what was written", folder.string(),
                                   each.tensor->info.name),
                       "the disk may be failing; run again with --force");
    }
  }
  return audited;
}

PackedCheckpointWriter::PackedCheckpointWriter(const Model& model, QuantizePlan plan,
                                               const fs::path& out) {
  CheckQuantizePlan(model, plan);
  state_ = std::make_unique<State>(model, std::move(plan), out);
  state_->shards = LayOutPacked(model, state_->plan);
  state_->CreateFiles();
}

PackedCheckpointWriter::~PackedCheckpointWriter() = default;

void PackedCheckpointWriter::WriteExpert(int64_t layer, int64_t expert,
                                         std::span<const std::byte> gate,
                                         std::span<const std::byte> up,
                                         std::span<const std::byte> down) {
  Made& made = state_->Find(layer, expert, PackedMatrix::kQ);
  const FeedForwardSlices& slices =
      state_->model.layers()[static_cast<size_t>(layer)].experts[static_cast<size_t>(expert)];
  const PackedFormat format =
      state_->plan.layers[static_cast<size_t>(layer)].Expert(static_cast<size_t>(expert));
  const auto require = [&](std::span<const std::byte> bytes, const TensorSlice& slice) {
    const uint64_t expected = PackedBytes(format, slice.rows, slice.cols);
    if (bytes.size() == expected) return;
    throw RuntimeError(fmt::format("layer {}, expert {}: {} bytes of {}, expected {}", layer,
                                   expert, bytes.size(), PackedFormatName(format), expected));
  };
  require(gate, slices.gate);
  require(up, slices.up);
  require(down, slices.down);
  if (made.written > 0) {
    throw RuntimeError(fmt::format("layer {}, expert {} was written twice", layer, expert));
  }
  for (const std::span<const std::byte> part : {gate, up, down}) state_->Append(made, part);
}

void PackedCheckpointWriter::WriteMatrix(int64_t layer, Matrix matrix,
                                         std::span<const std::byte> bytes) {
  const Made& made = state_->Find(layer, -1, matrix);
  if (bytes.size() != made.tensor->info.bytes) {
    throw RuntimeError(fmt::format("tensor {}: {} bytes, expected {}", made.tensor->info.name,
                                   bytes.size(), made.tensor->info.bytes));
  }
  WriteRows(layer, matrix, 0, bytes);
}

void PackedCheckpointWriter::WriteRows(int64_t layer, Matrix matrix, int64_t first_row,
                                       std::span<const std::byte> bytes) {
  Made& made = state_->Find(layer, -1, matrix);
  const TensorSlice& slice = SliceOf(state_->model, layer, matrix);
  const PackedFormat& format = FormatOf(state_->plan, layer, matrix);
  const uint64_t begin = PackedBytes(format, first_row, slice.cols);
  if (first_row % kPackedRows != 0 || begin != made.written ||
      bytes.size() > made.tensor->info.bytes - begin) {
    throw RuntimeError(fmt::format("tensor {}: {} bytes from row {} on do not follow {} bytes",
                                   made.tensor->info.name, bytes.size(), first_row, made.written));
  }
  state_->Append(made, bytes);
}

PackedWriteResult PackedCheckpointWriter::Finish(const std::string& card, const OrderedJson& record,
                                                 const JobControl& control) {
  state_->RequireComplete();
  state_->CopyTensors(control);
  state_->WriteFiles(card, record);
  PackedWriteResult result;
  result.bytes_written = total_bytes();
  result.audited_tensors = state_->Audit();
  state_->files.clear();
  fs::remove_all(state_->out);
  RenameDurably(state_->folder, state_->out);
  state_->owns_folder = false;
  return result;
}

uint64_t PackedCheckpointWriter::total_bytes() const {
  uint64_t total = 0;
  for (const PackedShard& shard : state_->shards) total += shard.bytes;
  return total;
}

const TensorSlice& SliceOf(const Model& model, int64_t layer, PackedMatrix matrix) {
  if (matrix == PackedMatrix::kLmHead) return model.lm_head();
  const LayerSlices& slices = model.layers().at(static_cast<size_t>(layer));
  switch (matrix) {
    case PackedMatrix::kQ:
      return slices.q;
    case PackedMatrix::kK:
      return slices.k;
    case PackedMatrix::kV:
      return slices.v;
    case PackedMatrix::kO:
      return slices.o;
    case PackedMatrix::kSharedGate:
      return slices.shared.gate;
    case PackedMatrix::kSharedUp:
      return slices.shared.up;
    case PackedMatrix::kSharedDown:
      return slices.shared.down;
    case PackedMatrix::kDenseGate:
      return slices.dense.gate;
    case PackedMatrix::kDenseUp:
      return slices.dense.up;
    case PackedMatrix::kDenseDown:
      return slices.dense.down;
    case PackedMatrix::kLmHead:
      break;
  }
  return model.lm_head();
}

const PackedFormat& FormatOf(const QuantizePlan& plan, int64_t layer, PackedMatrix matrix) {
  if (matrix == PackedMatrix::kLmHead) return plan.lm_head;
  const LayerFormats& formats = plan.layers.at(static_cast<size_t>(layer));
  if (matrix <= PackedMatrix::kO) return formats.attention;
  return matrix <= PackedMatrix::kSharedDown ? formats.shared : formats.dense;
}

}  // namespace winnow
