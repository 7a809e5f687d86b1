#include "eval/task_items.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/json.h"
#include "text/json_lines.h"
#include "text/text_source.h"

namespace winnow {
namespace {

constexpr const char* kForms =
    "an item has task, query, choices and gold; or context_options, continuation and gold; or "
    "context and target";

// One line of a file, whose messages say where.
class ItemReader {
 public:
  ItemReader(const std::string& where, const Json& object) : where_(where), object_(object) {}

  TaskItem Read() const {
    TaskItem item;
    item.where = where_;
    item.task = Text("task");
    const std::string separator = object_.contains("sep") ? String(object_["sep"], "sep") : " ";
    if (object_.contains("context_options")) {
      const std::string continuation = Text("continuation");
      for (const std::string& context : Texts("context_options")) {
        Add(item, context, separator, continuation);
      }
      item.gold = Gold(item.requests.size(), "context_options");
    } else if (HasChoices()) {
      const std::string query = String(Value("query"), "query");
      for (const std::string& choice : Texts("choices")) Add(item, query, separator, choice);
      item.gold = Gold(item.requests.size(), "choices");
    } else if (object_.contains("target")) {
      const char* key = object_.contains("context") ? "context" : "query";
      Add(item, String(Value(key), key), separator, Text("target"));
    } else {
      Refuse("no choices and no target");
    }
    return item;
  }

 private:
  [[noreturn]] void Refuse(const std::string& what) const {
    throw ModelError(fmt::format("{}: {}", where_, what), kForms);
  }
  const Json& Value(const char* key) const {
    const auto found = object_.find(key);
    if (found == object_.end()) Refuse(fmt::format("no key \"{}\"", key));
    return *found;
  }
  std::string String(const Json& value, const std::string& key) const {
    if (!value.is_string()) {
      Refuse(fmt::format("\"{}\" is {}, expected a string", key, value.type_name()));
    }
    return value.get<std::string>();
  }
  std::string Text(const std::string& key) const {
    std::string text = String(Value(key.c_str()), key);
    if (text.empty()) Refuse(fmt::format("\"{}\" is empty", key));
    return text;
  }
  bool HasChoices() const {
    const auto found = object_.find("choices");
    if (found == object_.end()) return false;
    // An empty list is how an item says that it has a target instead.
    return !(found->is_array() && found->empty());
  }
  std::vector<std::string> Texts(const char* key) const {
    const Json& list = Value(key);
    if (!list.is_array()) {
      Refuse(fmt::format("\"{}\" is {}, expected an array of strings", key, list.type_name()));
    }
    if (list.size() < 2) {
      Refuse(fmt::format("\"{}\" has {} entries, expected two or more", key, list.size()));
    }
    std::vector<std::string> texts;
    for (size_t i = 0; i < list.size(); ++i) {
      const std::string name = fmt::format("{}[{}]", key, i);
      texts.push_back(String(list[i], name));
      if (texts.back().empty()) Refuse(fmt::format("\"{}\" is empty", name));
    }
    return texts;
  }
  int32_t Gold(size_t choices, const char* of) const {
    const Json& gold = Value("gold");
    if (!gold.is_number_integer()) {
      Refuse(fmt::format("\"gold\" is {}, expected a whole number", DumpJson(gold)));
    }
    // Unsigned numbers beyond the signed range wrap to negative ones, which are refused.
    const auto index = gold.get<int64_t>();
    if (index < 0 || index >= static_cast<int64_t>(choices)) {
      Refuse(fmt::format("\"gold\" is {}, expected 0 to {}: \"{}\" has {} entries", DumpJson(gold),
                         choices - 1, of, choices));
    }
    return static_cast<int32_t>(index);
  }
  static void Add(TaskItem& item, const std::string& context, const std::string& separator,
                  const std::string& text) {
    item.requests.push_back({context, separator + text});
    item.bytes.push_back(static_cast<int64_t>(text.size()));
    // Bytes that begin a character; the text is UTF-8.
    item.characters.push_back(std::count_if(text.begin(), text.end(), [](char c) {
      return (static_cast<unsigned char>(c) & 0xc0u) != 0x80u;
    }));
  }

  const std::string& where_;
  const Json& object_;
};

}  // namespace

std::vector<TaskItem> ReadTaskItems(const fs::path& path, int64_t limit) {
  std::vector<TaskItem> items;
  ReadJsonObjects(path, [&](const std::string& where, const Json& object, std::string_view) {
    items.push_back(ItemReader(where, object).Read());
    return limit == 0 || static_cast<int64_t>(items.size()) < limit;
  });
  if (items.empty()) {
    throw UsageError(fmt::format("{}: no items", path.string()),
                     "expected a .jsonl file with one item a line");
  }
  return items;
}

}  // namespace winnow
