#include "condense/expert_outputs.h"

namespace winnow {

ExpertOutputs::ExpertOutputs(int64_t num_experts, int64_t num_tokens, int64_t hidden,
                             const fs::path& path)
    : num_tokens_(num_tokens), hidden_(hidden) {
  if (path.empty()) {
    memory_ = AlignedBuffer<float>(
        static_cast<size_t>(Bytes(num_experts, num_tokens, hidden) / sizeof(float)));
    return;
  }
  file_ = File::Create(path);
  fs::remove(path);  // the open file lives on without a name and vanishes with the process
}

float* ExpertOutputs::Rows(int64_t expert, int64_t first, int64_t count) {
  if (!file_) return memory_.data() + Offset(expert, first);
  const auto floats = static_cast<size_t>(count * hidden_);
  if (memory_.size() < floats) {
    memory_ = AlignedBuffer<float>();  // not both at once
    memory_ = AlignedBuffer<float>(floats);
  }
  return memory_.data();
}

void ExpertOutputs::Store(int64_t expert, int64_t first, int64_t count) {
  if (!file_) return;
  file_->WriteAt(Offset(expert, first) * sizeof(float),
                 std::as_bytes(std::span(memory_.data(), static_cast<size_t>(count * hidden_))));
}

const float* ExpertOutputs::Load(int64_t expert, int64_t first, int64_t count) {
  float* rows = Rows(expert, first, count);
  if (file_) {
    file_->ReadAt(Offset(expert, first) * sizeof(float),
                  std::as_writable_bytes(std::span(rows, static_cast<size_t>(count * hidden_))));
  }
  return rows;
}

}  // namespace winnow
