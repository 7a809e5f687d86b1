#include "base/json.h"

#include <fmt/format.h>

#include <unordered_set>
#include <vector>

#include "base/error.h"

namespace winnow {
namespace {

// Validates without building anything, so that a hostile document costs no memory beyond its keys.
class StrictChecker : public nlohmann::json_sax<Json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override {
    keys_.emplace_back();
    return Enter();
  }
  bool end_object() override {
    keys_.pop_back();
    --depth_;
    return true;
  }
  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    problem_ = fmt::format("key \"{}\" appears twice in one object", name.substr(0, 200));
    return false;
  }
  bool start_array(std::size_t) override { return Enter(); }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const Json::exception& e) override {
    std::string what = e.what();
    if (const size_t colon = what.find("syntax error"); colon != std::string::npos) {
      what = what.substr(colon);
    }
    problem_ = fmt::format("not valid JSON at byte {}: {}", position, what.substr(0, 300));
    return false;
  }
  const std::string& problem() const { return problem_; }

 private:
  bool Enter() {
    if (++depth_ <= kMaxJsonDepth) return true;
    problem_ = fmt::format("nested deeper than {} levels", kMaxJsonDepth);
    return false;
  }
  std::vector<std::unordered_set<std::string>> keys_;
  int depth_ = 0;
  std::string problem_;
};

template <class J>
J Parse(std::string_view text, const std::string& where) {
  // The parser takes a zero byte for the end of its input and would accept anything behind it.
  if (const size_t zero = text.find('\0'); zero != std::string_view::npos) {
    throw ModelError(fmt::format("{}: not valid JSON: zero byte at {}", where, zero),
                     "the file is damaged; fetch or write it again");
  }
  StrictChecker checker;
  if (!Json::sax_parse(text.begin(), text.end(), &checker)) {
    throw ModelError(fmt::format("{}: {}", where, checker.problem()),
                     "the file is damaged or was cut off; fetch or write it again");
  }
  return J::parse(text.begin(), text.end());
}

}  // namespace

Json ParseJson(std::string_view text, const std::string& where) {
  return Parse<Json>(text, where);
}

OrderedJson ParseOrderedJson(std::string_view text, const std::string& where) {
  return Parse<OrderedJson>(text, where);
}

std::string DumpJson(const Json& value, int indent) {
  return value.dump(indent, ' ', false, Json::error_handler_t::replace);
}

}  // namespace winnow
