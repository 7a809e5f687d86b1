#include "chat/special_tokens.h"

#include <fmt/format.h>

#include "base/error.h"
#include "tokenizer/tokenizer_class.h"

namespace winnow::chat {
namespace {

constexpr const char* kNames[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                  "pad_token", "cls_token", "mask_token"};
constexpr uint64_t kMaxFileBytes = uint64_t{16} << 20;

std::string Content(const Json& token, const std::string& where) {
  if (token.is_string()) return token.get<std::string>();
  if (token.is_object() && token.contains("content") && token["content"].is_string()) {
    return token["content"].get<std::string>();
  }
  throw ModelError(fmt::format("{} is {}, expected a string or an object with a string \"content\"",
                               where, token.type_name()));
}

Json ReadMap(const fs::path& path) {
  std::error_code ignored;
  if (!fs::exists(path, ignored)) return Json::object();
  Json map = ParseJson(ReadTextFile(path, kMaxFileBytes), path.string());
  if (!map.is_object()) throw ModelError(fmt::format("{}: expected an object", path.string()));
  return map;
}

// Sets `name` from `from` if it has it; false if it has not.
bool SetFrom(const Json& from, const char* name, const std::string& where, OrderedJson& tokens) {
  if (!from.is_object() || !from.contains(name)) return false;
  if (!from[name].is_null()) tokens[name] = Content(from[name], where + ": " + name);
  return true;
}

}  // namespace

OrderedJson SpecialTokens(const fs::path& model_folder, const Json& config,
                          const std::string& where) {
  const fs::path map_path = model_folder / "special_tokens_map.json";
  const Json map = ReadMap(map_path);
  OrderedJson tokens = OrderedJson::object();
  std::string tokenizer_class;
  if (config.is_object() && config.contains("tokenizer_class") &&
      config["tokenizer_class"].is_string()) {
    tokenizer_class = config["tokenizer_class"].get<std::string>();
  }
  const tok::RebuildingClass* defaults = tok::FindRebuildingClass(tokenizer_class);
  for (const char* name : kNames) {
    if (SetFrom(config, name, where, tokens) || SetFrom(map, name, map_path.string(), tokens)) {
      continue;
    }
    if (defaults == nullptr) continue;
    if (name == std::string_view("bos_token")) tokens[name] = defaults->bos_token;
    if (name == std::string_view("eos_token")) tokens[name] = defaults->eos_token;
  }
  if (!config.is_object()) return tokens;
  if (config.contains("additional_special_tokens") &&
      config["additional_special_tokens"].is_array()) {
    OrderedJson list = OrderedJson::array();
    for (const Json& token : config["additional_special_tokens"]) {
      list.push_back(Content(token, where + ": additional_special_tokens"));
    }
    tokens["additional_special_tokens"] = std::move(list);
  }
  if (config.contains("extra_special_tokens") && config["extra_special_tokens"].is_object()) {
    for (const auto& [name, token] : config["extra_special_tokens"].items()) {
      tokens[name] = Content(token, where + ": extra_special_tokens: " + name);
    }
  }
  return tokens;
}

}  // namespace winnow::chat
