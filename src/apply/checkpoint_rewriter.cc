#include "apply/checkpoint_rewriter.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "apply/condensed_layer.h"
#include "apply/export_code.h"
#include "apply/model_card.h"
#include "base/error.h"
#include "base/hash.h"

namespace winnow {
namespace {

constexpr uint64_t kJournalBytes = uint64_t{4} << 30;  // flushed and recorded at least this often
constexpr uint64_t kBufferBytes = uint64_t{4} << 20;   // multiple of every element size
constexpr uint64_t kAuditBytes = uint64_t{64} << 10;

// Converts `count` elements; both formats are F32, F16 or BF16.
void Convert(Dtype from, const std::byte* source, Dtype to, std::byte* target, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    StoreFloat(to, LoadAsFloat(from, source, i), target, i);
  }
}

struct Journal {
  std::string fingerprint;
  uint64_t shard = 0;    // shards before it are complete
  uint64_t tensors = 0;  // of that shard
};

std::string RunFingerprint(const Model& model, const CompressionPlan& plan,
                           const RewritePlan& rewrite, const ApplyOptions& options) {
  Fingerprint fingerprint;
  fingerprint.Add(PlanToJson(plan).dump());
  fingerprint.Add(model.checkpoint().FingerprintHex());
  fingerprint.Add(rewrite.config_json);
  fingerprint.Add(rewrite.index_json);
  for (const OutputShard& shard : rewrite.shards) {
    fingerprint.Add(shard.header);
    for (const auto& [layer, file] : options.refitted_layers) {
      if (file != nullptr) fingerprint.Add(file->path().filename().string() + file->header());
    }
    for (const OutputTensor& tensor : shard.tensors) {
      for (const SourceRange& range : tensor.ranges) {
        fingerprint.Add(range.tensor->name);
        fingerprint.Add(range.offset);
        if (range.replacement != nullptr) {
          fingerprint.Add(range.replacement->file->header());
          fingerprint.Add(range.replacement->file_offset + range.skip);
        }
      }
    }
  }
  return fingerprint.Hex();
}

class Rewriter {
 public:
  Rewriter(const Model& model, const CompressionPlan& plan, const RewritePlan& rewrite,
           const ApplyOptions& options, fs::path folder, const JobControl& control)
      : model_(model),
        plan_(plan),
        rewrite_(rewrite),
        options_(options),
        folder_(std::move(folder)),
        control_(control) {}

  void WriteShards() {
    // Twice the kernel's usual read-ahead, as cp asks for too.
    for (const auto& shard : model_.checkpoint().shards()) {
      posix_fadvise(shard.file().descriptor(), 0, 0, POSIX_FADV_SEQUENTIAL);
    }
    Journal journal = LoadJournal();
    for (const OutputShard& shard : rewrite_.shards) total_ += shard.bytes;
    for (size_t i = 0; i < rewrite_.shards.size(); ++i) {
      const OutputShard& shard = rewrite_.shards[i];
      if (i < journal.shard) {
        done_ += shard.bytes;
        continue;
      }
      WriteShard(shard, i, i == journal.shard ? journal.tensors : 0, journal);
      journal.shard = i + 1;
      journal.tensors = 0;
      SaveJournal(journal);
    }
  }

  uint64_t bytes_written() const { return written_; }

 private:
  Journal LoadJournal() {
    Journal journal;
    journal.fingerprint = RunFingerprint(model_, plan_, rewrite_, options_);
    const fs::path path = folder_ / "apply.journal";
    if (!options_.resume || !fs::exists(path)) return journal;
    const Json json = ParseJson(ReadTextFile(path), path.string());
    if (!json.is_object() || json.value("fingerprint", "") != journal.fingerprint) {
      throw UsageError(
          fmt::format("{} was made with another model, plan or flag", folder_.string()),
          "repeat the command as it was, or start again with --force");
    }
    journal.shard = json.value("shard", uint64_t{0});
    journal.tensors = json.value("tensors", uint64_t{0});
    return journal;
  }
  void SaveJournal(const Journal& journal) const {
    const OrderedJson json = {{"fingerprint", journal.fingerprint},
                              {"shard", journal.shard},
                              {"tensors", journal.tensors}};
    WriteFileAtomically(folder_ / "apply.journal", json.dump());
  }

  void WriteShard(const OutputShard& shard, size_t number, uint64_t first_tensor,
                  Journal& journal) {
    const fs::path path = folder_ / shard.file_name;
    const File out = first_tensor > 0 ? File::OpenWrite(path) : File::Create(path);
    if (first_tensor == 0) {
      out.WriteAt(0, std::as_bytes(std::span(shard.header)));
      done_ += shard.header.size();
    } else {
      done_ += shard.tensors[std::min<uint64_t>(first_tensor, shard.tensors.size() - 1)]
                   .info.file_offset;
    }
    uint64_t since_flush = 0;
    for (uint64_t i = first_tensor; i < shard.tensors.size();) {
      control_.Poll();
      const uint64_t begin = shard.tensors[i].info.file_offset;
      uint64_t next = i;
      uint64_t bytes = 0;
      if (IsPlainCopy(shard.tensors[i])) {
        // Neighbours in the source stay neighbours: one long copy instead of thousands of short
        // ones.
        const SourceRange& start = shard.tensors[i].ranges.front();
        uint64_t source_end = start.tensor->file_offset + start.offset;
        while (next < shard.tensors.size() && IsPlainCopy(shard.tensors[next]) &&
               shard.tensors[next].ranges.front().tensor->shard == start.tensor->shard &&
               shard.tensors[next].ranges.front().tensor->file_offset +
                       shard.tensors[next].ranges.front().offset ==
                   source_end &&
               bytes < (uint64_t{256} << 20)) {
          source_end += shard.tensors[next].info.bytes;
          bytes += shard.tensors[next].info.bytes;
          ++next;
        }
        out.CopyFrom(SourceFile(*start.tensor), start.tensor->file_offset + start.offset, begin,
                     bytes);
      } else {
        WriteTensor(shard.tensors[i], out);
        bytes = shard.tensors[i].info.bytes;
        ++next;
      }
      i = next;
      written_ += bytes;
      done_ += bytes;
      since_flush += bytes;
      control_.Report({.stage = "apply",
                       .work_done = static_cast<int64_t>(done_),
                       .work_total = static_cast<int64_t>(total_),
                       .bytes = true});
      if (since_flush >= kJournalBytes && i < shard.tensors.size()) {
        out.Sync();
        journal.shard = number;
        journal.tensors = i;
        SaveJournal(journal);
        since_flush = 0;
      }
    }
    out.Truncate(shard.bytes);
    out.Sync();
  }

  static bool IsPlainCopy(const OutputTensor& tensor) {
    return tensor.built_layer < 0 && tensor.ranges.size() == 1 &&
           tensor.ranges.front().replacement == nullptr && tensor.source_dtype == tensor.info.dtype;
  }
  const File& SourceFile(const TensorInfo& tensor) const {
    return model_.checkpoint().shards()[static_cast<size_t>(tensor.shard)].file();
  }

  void WriteTensor(const OutputTensor& tensor, const File& out) {
    uint64_t at = tensor.info.file_offset;
    if (tensor.built_layer >= 0) {
      const SafetensorsFile built =
          SafetensorsFile::Open(CondensedLayerPath(folder_, tensor.built_layer));
      out.CopyFrom(built.file(), built.Get(tensor.info.name).file_offset, at, tensor.info.bytes);
      return;
    }
    for (const SourceRange& range : tensor.ranges) {
      const bool replaced = range.replacement != nullptr;
      const File& source = replaced ? range.replacement->file->file() : SourceFile(*range.tensor);
      const uint64_t from = replaced ? range.replacement->file_offset + range.skip
                                     : range.tensor->file_offset + range.offset;
      if (range.dtype() == tensor.info.dtype) {
        out.CopyFrom(source, from, at, range.bytes);
        at += range.bytes;
        continue;
      }
      const uint64_t in_size = DtypeBits(range.dtype()) / 8;
      const uint64_t out_size = DtypeBits(tensor.info.dtype) / 8;
      std::vector<std::byte> input(kBufferBytes), output(kBufferBytes / in_size * out_size);
      for (uint64_t done = 0; done < range.bytes;) {
        const uint64_t part = std::min<uint64_t>(kBufferBytes, range.bytes - done);
        source.ReadAt(from + done, std::span(input).first(part));
        const uint64_t count = part / in_size;
        Convert(range.dtype(), input.data(), tensor.info.dtype, output.data(), count);
        out.WriteAt(at, std::span(output).first(count * out_size));
        at += count * out_size;
        done += part;
      }
    }
  }

  const Model& model_;
  const CompressionPlan& plan_;
  const RewritePlan& rewrite_;
  const ApplyOptions& options_;
  fs::path folder_;
  const JobControl& control_;
  uint64_t total_ = 0, done_ = 0, written_ = 0;
};

// Opens what was written as a model of its own and compares the ends of every tensor with the
// source.
int64_t Audit(const Model& source, const RewritePlan& rewrite, const fs::path& folder) {
  const Model written = Model::Open(folder);
  int64_t audited = 0;
  std::vector<std::byte> expected, found;
  for (const OutputShard& shard : rewrite.shards) {
    for (const OutputTensor& tensor : shard.tensors) {
      const TensorInfo* info = written.checkpoint().Find(tensor.info.name);
      bool same =
          info != nullptr && info->shape == tensor.info.shape && info->dtype == tensor.info.dtype;
      uint64_t at = 0;
      if (same && tensor.built_layer >= 0) {
        const SafetensorsFile built =
            SafetensorsFile::Open(CondensedLayerPath(folder, tensor.built_layer));
        const TensorInfo& of = built.Get(tensor.info.name);
        for (const bool tail : {false, true}) {
          const uint64_t bytes = std::min(of.bytes, kAuditBytes);
          expected.resize(bytes);
          found.resize(bytes);
          built.ReadPart(of, tail ? of.bytes - bytes : 0, expected);
          written.checkpoint().ReadPart(*info, tail ? of.bytes - bytes : 0, found);
          same = same && expected == found;
        }
      }
      for (const SourceRange& range : tensor.ranges) {
        if (!same) break;
        if (range.dtype() != tensor.info.dtype) {  // converted: nothing to compare with
          at += range.bytes / DtypeBits(range.dtype()) * DtypeBits(tensor.info.dtype);
          continue;
        }
        for (const bool tail : {false, true}) {
          const uint64_t bytes = std::min(range.bytes, kAuditBytes);
          const uint64_t offset = tail ? range.bytes - bytes : 0;
          expected.resize(bytes);
          found.resize(bytes);
          if (range.replacement != nullptr) {
            range.replacement->file->file().ReadAt(
                range.replacement->file_offset + range.skip + offset, expected);
          } else {
            source.checkpoint().ReadPart(*range.tensor, range.offset + offset, expected);
          }
          written.checkpoint().ReadPart(*info, at + offset, found);
          same = same && expected == found;
        }
        at += range.bytes;
      }
      if (!same) {
        throw ModelError(fmt::format("{}: tensor {} differs from its source after writing",
                                     folder.string(), tensor.info.name),
                         "the disk may be failing; run again with --force");
      }
      ++audited;
    }
  }
  return audited;
}

}  // namespace

ApplyResult ApplyPlan(const Model& model, const CompressionPlan& plan, const RewritePlan& rewrite,
                      const ApplyOptions& options, const fs::path& output,
                      const JobControl& control) {
  const fs::path folder = output.string() + ".partial";
  if (!options.resume) fs::remove_all(folder);
  uint64_t there = 0;  // what an interrupted run has written already
  if (fs::exists(folder)) {
    for (const OutputShard& shard : rewrite.shards) {
      if (fs::exists(folder / shard.file_name)) there += fs::file_size(folder / shard.file_name);
    }
  }
  RequireDiskSpace(output, rewrite.bytes_after - std::min(there, rewrite.bytes_after),
                   "the new checkpoint");
  fs::create_directories(folder);
  const auto start = std::chrono::steady_clock::now();
  ApplyResult result;
  for (const LayerPlan& layer : plan.layers) {
    if (!layer.condensed) continue;
    control.Poll();
    const auto refitted = options.refitted_layers.find(layer.layer);
    const bool has_refit = refitted != options.refitted_layers.end();
    BuildCondensedLayer(model, layer, FormOf(layer, options.condensed_form, has_refit),
                        options.dtype, rewrite.stock_width,
                        has_refit ? refitted->second.get() : nullptr,
                        CondensedLayerPath(folder, layer.layer));
  }
  Rewriter rewriter(model, plan, rewrite, options, folder, control);
  rewriter.WriteShards();
  for (const fs::path& file : rewrite.other_files) {
    fs::create_directories((folder / file).parent_path());
    fs::copy_file(model.checkpoint().folder() / file, folder / file,
                  fs::copy_options::overwrite_existing);
  }
  if (options.export_code) WriteFileAtomically(folder / kModelingFileName, ModelingCode());
  WriteFileAtomically(folder / "config.json", rewrite.config_json);
  if (!rewrite.index_json.empty()) {
    WriteFileAtomically(folder / "model.safetensors.index.json", rewrite.index_json);
  }
  WriteFileAtomically(folder / "winnow-plan.json", PlanToJson(plan).dump(1) + "\n");
  WriteFileAtomically(folder / CardFileName(model.checkpoint()),
                      ModelCard(plan, rewrite, CardChanges(options), ""));
  result.bytes_written = rewriter.bytes_written();
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  result.audited_tensors = Audit(model, rewrite, folder);
  fs::remove(folder / "apply.journal");
  for (const int32_t layer : rewrite.condensed_layers) {
    fs::remove(CondensedLayerPath(folder, layer));
  }
  fs::remove_all(output);
  RenameDurably(folder, output);
  return result;
}

}  // namespace winnow
