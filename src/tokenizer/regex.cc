#include "tokenizer/regex.h"

#include <fmt/format.h>

#include <algorithm>
#include <new>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/error.h"
#include "tokenizer/oniguruma.h"

namespace winnow::tok {
namespace {

constexpr size_t kFirstStackBytes = size_t{32} << 10;
constexpr size_t kLastStackBytes = size_t{4} << 20;
// For the interpreter, which takes over where the compiled code's stack does not suffice.
constexpr uint32_t kHeapLimitKib = 512 << 10;
// Backtracking steps allowed from one start: a few per byte are normal (`\s*[\r\n]+` on a long run
// of spaces), more than that means a pattern whose time explodes, which no tokenizer was trained
// with. Oniguruma gives up after 10 million.
constexpr uint32_t kMatchLimit = 10'000'000;
constexpr size_t kMatchLimitPerByte = 16;

uint32_t MatchLimit(size_t text_bytes) {
  constexpr size_t kLargest = (UINT32_MAX - kMatchLimit) / kMatchLimitPerByte;
  return kMatchLimit + static_cast<uint32_t>(kMatchLimitPerByte * std::min(text_bytes, kLargest));
}

template <auto kFree>
struct Free {
  template <class T>
  void operator()(T* pointer) const {
    kFree(pointer);
  }
};

std::string ErrorText(int code) {
  PCRE2_UCHAR buffer[256];
  if (pcre2_get_error_message(code, buffer, sizeof buffer) < 0)
    return fmt::format("error {}", code);
  return std::string(reinterpret_cast<const char*>(buffer));
}

}  // namespace

struct RegexScratch::State {
  std::unique_ptr<pcre2_match_data, Free<pcre2_match_data_free>> match_data;
  std::unique_ptr<pcre2_match_context, Free<pcre2_match_context_free>> context;
  std::unique_ptr<pcre2_jit_stack, Free<pcre2_jit_stack_free>> stack;
  size_t text_bytes = 0;  // that the match limit is set for
};

RegexScratch::RegexScratch() : state_(std::make_unique<State>()) {
  state_->match_data.reset(pcre2_match_data_create(1, nullptr));
  state_->context.reset(pcre2_match_context_create(nullptr));
  state_->stack.reset(pcre2_jit_stack_create(kFirstStackBytes, kLastStackBytes, nullptr));
  if (!state_->match_data || !state_->context) throw std::bad_alloc();
  pcre2_set_match_limit(state_->context.get(), MatchLimit(0));
  pcre2_set_heap_limit(state_->context.get(), kHeapLimitKib);
  if (state_->stack) {
    pcre2_jit_stack_assign(state_->context.get(), nullptr, state_->stack.get());
  }
}
RegexScratch::RegexScratch(RegexScratch&&) noexcept = default;
RegexScratch::~RegexScratch() = default;

struct Regex::Code {
  std::unique_ptr<pcre2_code, Free<pcre2_code_free>> code;
  bool is_compiled = false;  // to machine code
  std::string description;
};

Regex::Regex(std::string_view oniguruma_pattern, const std::string& where) {
  const std::string pattern = OnigurumaToPcre2(oniguruma_pattern, where);
  const std::unique_ptr<pcre2_compile_context, Free<pcre2_compile_context_free>> context(
      pcre2_compile_context_create(nullptr));
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  size_t offset = 0;
  auto code = std::make_shared<Code>();
  code->description = fmt::format("{}: pattern \"{}\"", where, oniguruma_pattern.substr(0, 300));
  code->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK, &error, &offset,
                                 context.get()));
  if (!code->code) {
    throw ModelError(fmt::format("{} does not compile: {}", code->description, ErrorText(error)));
  }
  code->is_compiled = pcre2_jit_compile(code->code.get(), PCRE2_JIT_COMPLETE) == 0;
  code_ = std::move(code);
}

bool Regex::Search(std::string_view text, size_t from, RegexScratch& scratch, Span* match) const {
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  RegexScratch::State& state = *scratch.state_;
  if (text.size() > state.text_bytes) {
    pcre2_set_match_limit(state.context.get(), MatchLimit(text.size()));
    state.text_bytes = text.size();
  }
  int result = PCRE2_ERROR_JIT_STACKLIMIT;
  if (code_->is_compiled) {
    result = pcre2_jit_match(code_->code.get(), subject, text.size(), from, 0,
                             state.match_data.get(), state.context.get());
  }
  if (result == PCRE2_ERROR_JIT_STACKLIMIT) {
    result =
        pcre2_match(code_->code.get(), subject, text.size(), from,
                    PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, state.match_data.get(), state.context.get());
  }
  if (result == PCRE2_ERROR_NOMATCH) return false;
  if (result < 0) {
    throw RuntimeError(fmt::format("{}: cannot be matched against {} bytes of text: {}",
                                   code_->description, text.size(), ErrorText(result)));
  }
  const size_t* offsets = pcre2_get_ovector_pointer(state.match_data.get());
  *match = {offsets[0], offsets[1]};
  return true;
}

}  // namespace winnow::tok
