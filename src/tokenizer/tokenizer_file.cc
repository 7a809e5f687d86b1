#include "tokenizer/tokenizer_file.h"

#include <fmt/format.h>

#include <limits>
#include <utility>

#include "base/error.h"

namespace winnow::tok {
namespace {

class Reader : public nlohmann::json_sax<Json> {
 public:
  explicit Reader(TokenizerFile& file) : file_(file) {}
  const std::string& problem() const { return problem_; }

  bool null() override { return Scalar(nullptr, "null"); }
  bool boolean(bool value) override { return Scalar(value, "a boolean"); }
  bool number_integer(number_integer_t value) override {
    return Scalar(value, "a negative number");
  }
  bool number_float(number_float_t value, const string_t&) override {
    return Scalar(value, "a fraction");
  }
  bool binary(binary_t&) override { return Fail("binary value"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (mode_ != Mode::kVocab) return Scalar(value, "a number");
    if (value >= static_cast<uint64_t>(std::numeric_limits<int32_t>::max())) {
      return Fail(fmt::format("id {} of token \"{}\" is too large", value,
                              file_.Get(token_).substr(0, 100)));
    }
    file_.vocab.push_back({token_, static_cast<int32_t>(value)});
    return true;
  }

  bool string(string_t& value) override {
    if (mode_ == Mode::kMergePair) {
      file_.merge_parts.push_back(Store(value));
      return ++pair_parts_ <= 2 || Fail("a merge must have two parts");
    }
    if (mode_ == Mode::kMerges) return MergeLine(value);
    return Scalar(std::move(value), "a string");
  }

  bool key(string_t& name) override {
    if (mode_ == Mode::kVocab) {
      token_ = Store(name);
      return true;
    }
    key_ = std::move(name);
    if (!open_.back()->contains(key_)) return true;
    return Fail(fmt::format("key \"{}\" appears twice in one object", key_.substr(0, 200)));
  }

  bool start_object(std::size_t) override {
    if (mode_ != Mode::kRest) return Unexpected("an object");
    if (InModel() && key_ == "vocab") {
      mode_ = Mode::kVocab;
      file_.has_vocab = true;
      return true;
    }
    return Open(Json::object());
  }
  bool end_object() override {
    if (mode_ == Mode::kVocab) {
      mode_ = Mode::kRest;
      return Close("vocab");
    }
    open_.pop_back();
    return true;
  }

  bool start_array(std::size_t) override {
    if (mode_ == Mode::kMerges) {
      mode_ = Mode::kMergePair;
      pair_parts_ = 0;
      return !merge_lines_ || Fail("merges must be all strings or all pairs");
    }
    if (mode_ != Mode::kRest) return Unexpected("an array");
    if (InModel() && key_ == "merges") {
      mode_ = Mode::kMerges;
      file_.has_merges = true;
      return true;
    }
    return Open(Json::array());
  }
  bool end_array() override {
    if (mode_ == Mode::kMergePair) {
      mode_ = Mode::kMerges;
      return pair_parts_ == 2 || Fail("a merge must have two parts");
    }
    if (mode_ == Mode::kMerges) {
      mode_ = Mode::kRest;
      return Close("merges");
    }
    open_.pop_back();
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const Json::exception& e) override {
    std::string what = e.what();
    if (const size_t colon = what.find("syntax error"); colon != std::string::npos) {
      what = what.substr(colon);
    }
    return Fail(fmt::format("not valid JSON at byte {}: {}", position, what.substr(0, 300)));
  }

 private:
  enum class Mode { kRest, kVocab, kMerges, kMergePair };

  bool Fail(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }
  bool Unexpected(const char* what) {
    if (mode_ == Mode::kVocab) {
      return Fail(fmt::format("the id of token \"{}\" must be a non-negative integer, got {}",
                              file_.Get(token_).substr(0, 100), what));
    }
    return Fail(fmt::format("a merge must be two strings, got {}", what));
  }
  bool InModel() const {
    return open_.size() == 2 && file_.rest.is_object() && file_.rest.contains("model") &&
           open_[1] == &file_.rest["model"] && open_[1]->is_object();
  }

  TokenizerFile::Text Store(const std::string& text) {
    const TokenizerFile::Text stored{static_cast<uint32_t>(file_.bytes.size()),
                                     static_cast<uint32_t>(text.size())};
    file_.bytes += text;
    return stored;
  }

  Json* Put(Json value) {
    if (open_.empty()) {
      file_.rest = std::move(value);
      return &file_.rest;
    }
    if (open_.back()->is_array()) {
      open_.back()->push_back(std::move(value));
      return &open_.back()->back();
    }
    return &((*open_.back())[key_] = std::move(value));
  }
  template <class T>
  bool Scalar(T value, const char* what) {
    if (mode_ != Mode::kRest) return Unexpected(what);
    Put(Json(std::move(value)));
    return true;
  }
  // A pointer into an array stays valid: while a container is open nothing is added beside it.
  bool Open(Json container) {
    if (open_.size() == static_cast<size_t>(kMaxJsonDepth)) {
      return Fail(fmt::format("nested deeper than {} levels", kMaxJsonDepth));
    }
    open_.push_back(Put(std::move(container)));
    return true;
  }
  // Leaves a mark in the model, so that a second key of the same name is refused.
  bool Close(const char* name) {
    (*open_.back())[name] = nullptr;
    return true;
  }

  // "left right", the older form. A line "#version: 0.2" heads some files.
  bool MergeLine(const std::string& line) {
    if (!merge_lines_ && !file_.merge_parts.empty()) {
      return Fail("merges must be all strings or all pairs");
    }
    merge_lines_ = true;
    if (line.starts_with("#version")) return true;
    const size_t space = line.find(' ');
    if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos) {
      return Fail(fmt::format("merge \"{}\" must be two parts with one space between",
                              line.substr(0, 100)));
    }
    const TokenizerFile::Text stored = Store(line);
    const auto cut = static_cast<uint32_t>(space);
    file_.merge_parts.push_back({stored.offset, cut});
    file_.merge_parts.push_back({stored.offset + cut + 1, stored.bytes - cut - 1});
    return true;
  }

  TokenizerFile& file_;
  Mode mode_ = Mode::kRest;
  std::vector<Json*> open_;  // containers of `rest` being filled
  std::string key_;
  TokenizerFile::Text token_{0, 0};
  int pair_parts_ = 0;
  bool merge_lines_ = false;
  std::string problem_;
};

}  // namespace

TokenizerFile ParseTokenizerFile(std::string_view text, const std::string& where) {
  if (text.size() >= std::numeric_limits<uint32_t>::max()) {
    throw ModelError(fmt::format("{}: larger than 4 GiB", where));
  }
  TokenizerFile file;
  Reader reader(file);
  if (!Json::sax_parse(text.begin(), text.end(), &reader)) {
    throw ModelError(fmt::format("{}: {}", where, reader.problem()),
                     "the file is damaged or of an unknown kind; fetch or write it again");
  }
  return file;
}

}  // namespace winnow::tok
