#include "tokenizer/tokenizer.h"

#include <system_error>
#include <utility>

#include "tokenizer/tokenizer_impl.h"
#include "tokenizer/utf8.h"

namespace winnow {
namespace {

constexpr uint64_t kMaxFileBytes = uint64_t{128} << 20;

// Takes a context for one call and gives it back, whatever happens.
class ContextLease {
 public:
  explicit ContextLease(tok::ContextPool& pool) : pool_(pool), context_(pool.Take()) {}
  ~ContextLease() { pool_.Return(std::move(context_)); }
  ContextLease(const ContextLease&) = delete;
  ContextLease& operator=(const ContextLease&) = delete;
  tok::EncodeContext& operator*() const { return *context_; }

 private:
  tok::ContextPool& pool_;
  std::unique_ptr<tok::EncodeContext> context_;
};

}  // namespace

Tokenizer Tokenizer::Load(const fs::path& path) {
  std::error_code ignored;
  const fs::path file = fs::is_directory(path, ignored) ? path / "tokenizer.json" : path;
  const fs::path config = file.parent_path() / "tokenizer_config.json";
  return FromJson(ReadTextFile(file, kMaxFileBytes),
                  fs::exists(config, ignored) ? ReadTextFile(config, kMaxFileBytes) : std::string(),
                  file.string());
}

uint64_t Tokenizer::EstimateBytes(const fs::path& path) {
  // The text, its parsed form and our tables, measured at about 5 times the file for 32 k to 200 k
  // tokens; patterns and word caches are the constant.
  constexpr uint64_t kTimesFile = 8, kConstantBytes = uint64_t{16} << 20;
  std::error_code problem;
  const fs::path file = fs::is_directory(path, problem) ? path / "tokenizer.json" : path;
  const uintmax_t bytes = fs::file_size(file, problem);
  return problem ? 0 : std::min<uint64_t>(bytes, kMaxFileBytes) * kTimesFile + kConstantBytes;
}

Tokenizer Tokenizer::FromJson(std::string_view tokenizer_json,
                              std::string_view tokenizer_config_json, const std::string& where) {
  return Tokenizer(std::make_unique<const Impl>(tokenizer_json, tokenizer_config_json, where));
}

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

std::vector<int32_t> Tokenizer::Encode(std::string_view text, bool add_special_tokens) const {
  std::string repaired;
  if (tok::ValidUtf8Prefix(text) != text.size()) {
    tok::AppendLossyUtf8(text, repaired);
    text = repaired;
  }
  const tok::PostProcessor& post = impl_->post_processor;
  std::vector<int32_t> ids;
  if (add_special_tokens) ids = post.prefix;
  const ContextLease context(impl_->contexts);
  impl_->EncodeText(text, *context, ids);
  if (add_special_tokens) ids.insert(ids.end(), post.suffix.begin(), post.suffix.end());
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::string text;
  tok::DecodeRun run(impl_->decoder, /*streaming=*/false);
  for (const int32_t id : ids) {
    if (!impl_->HasId(id) || (skip_special_tokens && impl_->IsSkipped(id))) continue;
    run.Put(impl_->TextOf(id), text);
  }
  run.Finish(text);
  return text;
}

std::optional<int32_t> Tokenizer::TokenToId(std::string_view token) const {
  const int32_t id = impl_->TokenToId(token);
  return id == tok::TokenTable::kNone ? std::nullopt : std::optional(id);
}

std::string Tokenizer::IdToToken(int32_t id) const {
  return std::string(impl_->IdToToken(id));
}

int32_t Tokenizer::vocab_size() const {
  return impl_->max_id() + 1;
}

std::optional<int32_t> Tokenizer::bos_id() const {
  return impl_->bos_id;
}

std::optional<int32_t> Tokenizer::eos_id() const {
  return impl_->eos_id;
}

bool Tokenizer::adds_bos() const {
  const std::vector<int32_t>& prefix = impl_->post_processor.prefix;
  return impl_->bos_id && !prefix.empty() && prefix[0] == *impl_->bos_id;
}

struct StreamDecoder::State {
  const Tokenizer::Impl* tokenizer;
  bool skip_special_tokens;
  tok::DecodeRun run;
};

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens)
    : state_(new State{tokenizer.impl_.get(), skip_special_tokens,
                       tok::DecodeRun(tokenizer.impl_->decoder, /*streaming=*/true)}) {}
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;
StreamDecoder::~StreamDecoder() = default;

std::string StreamDecoder::Put(int32_t id) {
  std::string text;
  const Tokenizer::Impl& tokenizer = *state_->tokenizer;
  if (tokenizer.HasId(id) && !(state_->skip_special_tokens && tokenizer.IsSkipped(id))) {
    state_->run.Put(tokenizer.TextOf(id), text);
  }
  return text;
}

std::string StreamDecoder::Finish() {
  std::string text;
  state_->run.Finish(text);
  return text;
}

}  // namespace winnow
