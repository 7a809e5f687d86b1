#include "heal/activation_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/elementwise.h"

namespace winnow {

ActivationStore::ActivationStore(const fs::path& path) : file_(File::Create(path)) {
  fs::remove(path);
}

void ActivationStore::Append(const ExpertRows& rows) {
  const auto found = std::find_if(blocks_.begin(), blocks_.end(),
                                  [&](const Block& block) { return block.expert == rows.expert; });
  const auto at = static_cast<size_t>(found - blocks_.begin());
  if (found == blocks_.end()) {
    blocks_.push_back({rows.expert, rows.width, {}});
    pieces_.emplace_back();
  }
  Block& block = blocks_[at];
  Piece piece;
  piece.first_row = static_cast<int64_t>(block.tokens.size());
  piece.rows = rows.num_rows;
  piece.data = AlignedBuffer<float>(static_cast<size_t>(rows.num_rows * rows.width));
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    float* row = piece.data.data() + i * rows.width;
    SwiGlu(rows.gate + i * rows.width, rows.up + i * rows.width, rows.width, row);
    const float weight = rows.weights[static_cast<size_t>(i)];
    for (int64_t j = 0; j < rows.width; ++j) row[j] *= weight;
    block.tokens.push_back(static_cast<int32_t>(rows.tokens[static_cast<size_t>(i)]));
  }
  if (file_) {
    piece.file_offset = file_bytes_;
    file_->WriteAt(file_bytes_, std::as_bytes(std::as_const(piece.data).span()));
    file_bytes_ += piece.data.size_bytes();
    piece.data = AlignedBuffer<float>();
  }
  pieces_[at].push_back(std::move(piece));
}

void ActivationStore::Read(size_t block, int64_t first_row, int64_t count, int64_t first_column,
                           int64_t columns, float* out) const {
  const int64_t width = blocks_[block].width;
  for (const Piece& piece : pieces_[block]) {
    const int64_t begin = std::max(first_row, piece.first_row);
    const int64_t end = std::min(first_row + count, piece.first_row + piece.rows);
    for (int64_t r = begin; r < end; ++r) {
      float* to = out + (r - first_row) * columns;
      const int64_t in_piece = (r - piece.first_row) * width;
      if (!file_) {
        std::memcpy(to, piece.data.data() + in_piece + first_column,
                    static_cast<size_t>(columns) * sizeof(float));
        continue;
      }
      const uint64_t offset =
          piece.file_offset + static_cast<uint64_t>(in_piece + first_column) * sizeof(float);
      file_->ReadAt(offset, std::as_writable_bytes(std::span(to, static_cast<size_t>(columns))));
    }
  }
}

}  // namespace winnow
