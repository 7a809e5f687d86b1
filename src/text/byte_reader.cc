#include "text/byte_reader.h"

#include <fmt/format.h>
#include <lzma.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"

namespace winnow {
namespace {

// `xz -9` needs 65 MiB and `zstd --ultra -22` a window of 2^27; only archives made with unusual
// options ask for more.
constexpr uint64_t kXzMemoryBytes = uint64_t{128} << 20;
constexpr int kZstdWindowLog = 27;
constexpr size_t kInputBytes = size_t{256} << 10;

// The packed bytes, a buffer at a time.
class Input {
 public:
  explicit Input(const fs::path& path)
      : file_(File::OpenRead(path)), size_(file_.size()), buffer_(kInputBytes) {}

  // The next bytes of the file, empty at its end. Valid until the next call.
  std::span<const std::byte> Next() {
    const auto bytes = static_cast<size_t>(std::min<uint64_t>(buffer_.size(), size_ - offset_));
    const std::span<std::byte> part = std::span(buffer_).first(bytes);
    file_.ReadAt(offset_, part);
    offset_ += bytes;
    return part;
  }
  uint64_t offset() const { return offset_; }

  [[noreturn]] void ThrowDamaged(std::string_view kind, std::string_view reason) const {
    throw ModelError(fmt::format("{}: damaged {} archive near byte {}: {}", file_.path().string(),
                                 kind, offset_, reason),
                     "fetch or pack the file again");
  }
  [[noreturn]] void ThrowTruncated(std::string_view kind) const {
    throw ModelError(fmt::format("{}: the {} archive of {} bytes is cut off", file_.path().string(),
                                 kind, size_),
                     "fetch or pack the file again");
  }
  [[noreturn]] void ThrowTooMuchMemory(std::string_view kind) const {
    throw ModelError(fmt::format("{}: unpacking this {} archive takes more than 128 MiB of memory",
                                 file_.path().string(), kind),
                     "pack it again with ordinary options");
  }

 private:
  File file_;
  uint64_t size_;
  uint64_t offset_ = 0;
  std::vector<std::byte> buffer_;
};

class PlainReader : public ByteReader {
 public:
  explicit PlainReader(const fs::path& path) : file_(File::OpenRead(path)), size_(file_.size()) {}
  size_t Read(std::span<char> out) override {
    const auto bytes = static_cast<size_t>(std::min<uint64_t>(out.size(), size_ - offset_));
    file_.ReadAt(offset_, std::as_writable_bytes(out.first(bytes)));
    offset_ += bytes;
    return bytes;
  }

 private:
  File file_;
  uint64_t size_;
  uint64_t offset_ = 0;
};

class XzReader : public ByteReader {
 public:
  explicit XzReader(const fs::path& path) : input_(path) {
    if (lzma_stream_decoder(&stream_, kXzMemoryBytes, LZMA_CONCATENATED) != LZMA_OK) {
      throw RuntimeError(fmt::format("{}: cannot start the xz decoder", path.string()));
    }
  }
  ~XzReader() override { lzma_end(&stream_); }

  size_t Read(std::span<char> out) override {
    stream_.next_out = reinterpret_cast<uint8_t*>(out.data());
    stream_.avail_out = out.size();
    while (!ended_ && stream_.avail_out == out.size()) {
      if (stream_.avail_in == 0 && !at_end_) {
        const auto part = input_.Next();
        stream_.next_in = reinterpret_cast<const uint8_t*>(part.data());
        stream_.avail_in = part.size();
        at_end_ = part.empty();
      }
      switch (lzma_code(&stream_, at_end_ ? LZMA_FINISH : LZMA_RUN)) {
        case LZMA_OK:
          break;
        case LZMA_STREAM_END:
          ended_ = true;
          break;
        case LZMA_BUF_ERROR:
          input_.ThrowTruncated("xz");
        case LZMA_MEMLIMIT_ERROR:
          input_.ThrowTooMuchMemory("xz");
        case LZMA_MEM_ERROR:
          throw std::bad_alloc();
        case LZMA_FORMAT_ERROR:
          input_.ThrowDamaged("xz", "not in the xz format");
        case LZMA_OPTIONS_ERROR:
          input_.ThrowDamaged("xz", "it uses options xz does not define");
        default:
          input_.ThrowDamaged("xz", "its data is corrupt");
      }
    }
    return out.size() - stream_.avail_out;
  }

 private:
  Input input_;
  lzma_stream stream_ = LZMA_STREAM_INIT;
  bool at_end_ = false;
  bool ended_ = false;
};

class ZstdReader : public ByteReader {
 public:
  explicit ZstdReader(const fs::path& path) : input_(path), context_(ZSTD_createDCtx()) {
    if (context_ == nullptr ||
        ZSTD_isError(ZSTD_DCtx_setParameter(context_.get(), ZSTD_d_windowLogMax, kZstdWindowLog))) {
      throw RuntimeError(fmt::format("{}: cannot start the zstd decoder", path.string()));
    }
  }

  size_t Read(std::span<char> out) override {
    ZSTD_outBuffer output{out.data(), out.size(), 0};
    while (output.pos == 0) {
      if (packed_.pos == packed_.size) {
        const auto part = input_.Next();
        packed_ = {part.data(), part.size(), 0};
        if (part.empty() && in_frame_) {
          // The decoder may still hold unpacked bytes.
          Decode(output);
          if (output.pos == 0 && in_frame_) input_.ThrowTruncated("zstd");
          break;
        }
        if (part.empty()) break;
      }
      Decode(output);
    }
    return output.pos;
  }

 private:
  struct Free {
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
  };

  void Decode(ZSTD_outBuffer& output) {
    const size_t left = ZSTD_decompressStream(context_.get(), &output, &packed_);
    if (ZSTD_isError(left)) {
      if (ZSTD_getErrorCode(left) == ZSTD_error_frameParameter_windowTooLarge) {
        input_.ThrowTooMuchMemory("zstd");
      }
      input_.ThrowDamaged("zstd", ZSTD_getErrorName(left));
    }
    in_frame_ = left != 0;
  }

  Input input_;
  std::unique_ptr<ZSTD_DCtx, Free> context_;
  ZSTD_inBuffer packed_{nullptr, 0, 0};
  bool in_frame_ = true;  // an empty file is no archive
};

class GzipReader : public ByteReader {
 public:
  explicit GzipReader(const fs::path& path) : input_(path) {
    constexpr int kGzipOnly = 16 + MAX_WBITS;
    if (inflateInit2(&stream_, kGzipOnly) != Z_OK) {
      throw RuntimeError(fmt::format("{}: cannot start the gzip decoder", path.string()));
    }
  }
  ~GzipReader() override { inflateEnd(&stream_); }

  size_t Read(std::span<char> out) override {
    const size_t wanted = std::min<size_t>(out.size(), size_t{1} << 30);
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    stream_.avail_out = static_cast<uInt>(wanted);
    while (stream_.avail_out == wanted) {
      if (stream_.avail_in == 0) {
        part_ = input_.Next();
        // zlib's interface takes a pointer to non-const but never writes through it.
        stream_.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(part_.data()));
        stream_.avail_in = static_cast<uInt>(part_.size());
        if (part_.empty()) {
          if (in_member_) input_.ThrowTruncated("gzip");
          break;
        }
      }
      if (!in_member_) inflateReset(&stream_);
      in_member_ = true;
      const int status = inflate(&stream_, Z_NO_FLUSH);
      if (status == Z_STREAM_END) {
        in_member_ = false;
      } else if (status != Z_OK && status != Z_BUF_ERROR) {
        if (status == Z_MEM_ERROR) throw std::bad_alloc();
        input_.ThrowDamaged("gzip", stream_.msg != nullptr ? stream_.msg : "its data is corrupt");
      }
    }
    return wanted - stream_.avail_out;
  }

 private:
  Input input_;
  z_stream stream_{};
  std::span<const std::byte> part_;
  bool in_member_ = true;  // an empty file is no archive
};

}  // namespace

std::string_view CompressionSuffix(std::string_view file_name) {
  for (const std::string_view suffix : {".xz", ".zst", ".gz"}) {
    if (file_name.ends_with(suffix)) return suffix;
  }
  return {};
}

std::unique_ptr<ByteReader> OpenByteReader(const fs::path& path) {
  const std::string name = path.filename().string();
  const std::string_view suffix = CompressionSuffix(name);
  if (suffix == ".xz") return std::make_unique<XzReader>(path);
  if (suffix == ".zst") return std::make_unique<ZstdReader>(path);
  if (suffix == ".gz") return std::make_unique<GzipReader>(path);
  return std::make_unique<PlainReader>(path);
}

}  // namespace winnow
