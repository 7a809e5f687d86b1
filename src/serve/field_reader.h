// Typed access to the fields of a request's body. Absent and null are the same. Every field that is
// asked for counts as known; RefuseOthers then names the first that is not. ApiError 400 for what
// is mistyped or out of range.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/json.h"  // OrderedJson

namespace winnow {

class FieldReader {
 public:
  // `body` must outlive the reader. `prefix` is put before names in messages ("stream_options.").
  explicit FieldReader(const OrderedJson& body, std::string prefix = {});
  // The field's value, or nothing if it is absent or null.
  const OrderedJson* Find(const std::string& name);
  std::optional<bool> Flag(const std::string& name);
  std::optional<int64_t> Integer(const std::string& name, int64_t low, int64_t high);
  std::optional<double> Number(const std::string& name, double low, double high);
  std::optional<std::string> Text(const std::string& name);
  std::string Name(const std::string& field) const { return prefix_ + field; }

  // Fields that cannot change the answer.
  void Ignore(const std::vector<std::string>& names);
  void RefuseOthers() const;

 private:
  const OrderedJson& body_;
  std::string prefix_;
  std::set<std::string> known_;
};

// Token ids from a JSON array; `field` is for messages.
std::vector<int32_t> ReadTokenIds(const OrderedJson& list, const std::string& field,
                                  int64_t vocab_size);

}  // namespace winnow
