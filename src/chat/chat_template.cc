#include "chat/chat_template.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "base/error.h"
#include "chat/interpreter.h"
#include "chat/parser.h"
#include "chat/special_tokens.h"
#include "tokenizer/utf8.h"

namespace winnow {
namespace {

constexpr size_t kMaxTemplateBytes = size_t{4} << 20;
constexpr uint64_t kMaxFileBytes = uint64_t{128} << 20;

struct ParsedTemplate {
  std::string origin;
  chat::Block block;
};

[[noreturn]] void ThrowProblem(const std::string& origin, const chat::Problem& problem) {
  throw ModelError(
      fmt::format("{}: chat template line {}: {}", origin, problem.line(), problem.what()));
}

ParsedTemplate ParseSource(const std::string& source, std::string origin) {
  if (source.size() > kMaxTemplateBytes) {
    throw ModelError(fmt::format("{}: the chat template has {} bytes, expected at most {}", origin,
                                 source.size(), kMaxTemplateBytes));
  }
  if (tok::ValidUtf8Prefix(source) != source.size()) {
    throw ModelError(fmt::format("{}: the chat template is not UTF-8", origin));
  }
  try {
    chat::Block block = chat::ParseTemplate(source);
    return {std::move(origin), std::move(block)};
  } catch (const chat::Problem& problem) {
    ThrowProblem(origin, problem);
  }
}

bool HasGeneration(const chat::Block& block) {
  return std::any_of(block.begin(), block.end(), [](const auto& statement) {
    return statement->kind == chat::StatementKind::kGeneration || HasGeneration(statement->body) ||
           HasGeneration(statement->otherwise) ||
           std::any_of(statement->branches.begin(), statement->branches.end(),
                       [](const chat::Branch& branch) { return HasGeneration(branch.body); });
  });
}

std::tm LocalTime() {
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  return local;
}

// About the size of the input, which the limits of a rendering grow with.
uint64_t CountBytes(const OrderedJson& json) {
  if (json.is_string()) return json.get_ref<const std::string&>().size();
  uint64_t bytes = 8;
  for (const auto& [key, item] : json.items()) bytes += key.size() + CountBytes(item);
  return bytes;
}

void CheckMessages(const OrderedJson& messages) {
  const bool are_objects =
      messages.is_array() && std::all_of(messages.begin(), messages.end(),
                                         [](const OrderedJson& one) { return one.is_object(); });
  if (are_objects) return;
  throw UsageError("messages are no list of objects",
                   "expected [{\"role\": \"user\", \"content\": \"...\"}, ...]");
}

}  // namespace

struct ChatTemplate::Impl {
  ParsedTemplate usual;
  std::optional<ParsedTemplate> with_tools;
  std::vector<std::pair<std::string, chat::Value>> special_tokens;
  bool marks_generation = false;
};

namespace {

// A template's sources by name; "default" is the one without a name.
struct Sources {
  std::string origin;
  std::vector<std::pair<std::string, std::string>> templates;

  const std::string* Find(std::string_view name) const {
    for (const auto& [key, source] : templates) {
      if (key == name) return &source;
    }
    return nullptr;
  }
};

Sources SourcesOf(const Json& value, const std::string& where) {
  Sources sources{where, {}};
  if (value.is_string()) {
    sources.templates.emplace_back("default", value.get<std::string>());
    return sources;
  }
  const auto is_named = [](const Json& one) {
    return one.is_object() && one.contains("name") && one["name"].is_string() &&
           one.contains("template") && one["template"].is_string();
  };
  if (!value.is_array() || !std::all_of(value.begin(), value.end(), is_named)) {
    throw ModelError(
        fmt::format("{}: chat_template is {}, expected a string, or a list of objects "
                    "with name and template",
                    where, value.type_name()));
  }
  std::vector<std::string> names;
  for (const Json& one : value) {
    names.push_back(one["name"].get<std::string>());
    sources.templates.emplace_back(names.back(), one["template"].get<std::string>());
  }
  if (!names.empty() && sources.Find("default") == nullptr) {
    throw ModelError(fmt::format("{}: no chat template is called \"default\", there are: {}", where,
                                 fmt::join(names, ", ")),
                     "name one of them \"default\"");
  }
  return sources;
}

Sources FindSources(const fs::path& folder, const Json& config, const fs::path& config_path) {
  std::error_code ignored;
  const fs::path jinja = folder / "chat_template.jinja";
  if (fs::exists(jinja, ignored)) {
    return {jinja.string(), {{"default", ReadTextFile(jinja, kMaxTemplateBytes)}}};
  }
  if (config.is_object() && config.contains("chat_template") &&
      !config["chat_template"].is_null()) {
    return SourcesOf(config["chat_template"], config_path.string());
  }
  const fs::path json_path = folder / "chat_template.json";
  if (!fs::exists(json_path, ignored)) return {};
  const Json json = ParseJson(ReadTextFile(json_path, kMaxFileBytes), json_path.string());
  if (!json.is_object() || !json.contains("chat_template")) {
    throw ModelError(fmt::format("{}: no key \"chat_template\"", json_path.string()));
  }
  return SourcesOf(json["chat_template"], json_path.string());
}

std::vector<std::pair<std::string, chat::Value>> ToValues(const OrderedJson& object) {
  std::vector<std::pair<std::string, chat::Value>> values;
  for (const auto& [name, value] : object.items()) {
    values.emplace_back(name, chat::Value::FromJson(value));
  }
  return values;
}

}  // namespace

std::optional<ChatTemplate> ChatTemplate::Load(const fs::path& model_folder) {
  std::error_code ignored;
  const fs::path config_path = model_folder / "tokenizer_config.json";
  Json config;
  if (fs::exists(config_path, ignored)) {
    config = ParseJson(ReadTextFile(config_path, kMaxFileBytes), config_path.string());
  }
  const Sources sources = FindSources(model_folder, config, config_path);
  const std::string* usual = sources.Find("default");
  if (usual == nullptr) return std::nullopt;
  auto impl = std::make_shared<Impl>();
  impl->usual = ParseSource(*usual, sources.origin);
  if (const std::string* with_tools = sources.Find("tool_use")) {
    impl->with_tools = ParseSource(*with_tools, sources.origin + " (tool_use)");
  }
  impl->special_tokens = ToValues(chat::SpecialTokens(model_folder, config, config_path.string()));
  impl->marks_generation = HasGeneration(impl->usual.block);
  return ChatTemplate(std::move(impl));
}

ChatTemplate ChatTemplate::Parse(std::string source, std::string origin,
                                 OrderedJson special_tokens) {
  auto impl = std::make_shared<Impl>();
  impl->usual = ParseSource(source, std::move(origin));
  impl->special_tokens = ToValues(special_tokens);
  impl->marks_generation = HasGeneration(impl->usual.block);
  return ChatTemplate(std::move(impl));
}

std::string ChatTemplate::Render(const OrderedJson& messages, const ChatOptions& options) const {
  return RenderMarked(messages, options).text;
}

RenderedChat ChatTemplate::RenderMarked(const OrderedJson& messages,
                                        const ChatOptions& options) const {
  CheckMessages(messages);
  if (!options.variables.is_object())
    throw UsageError("variables of a chat template are no object");
  const bool has_tools =
      options.variables.contains("tools") && !options.variables["tools"].is_null();
  const ParsedTemplate& parsed = has_tools && impl_->with_tools ? *impl_->with_tools : impl_->usual;
  std::vector<std::pair<std::string, chat::Value>> variables = {{"tools", chat::Value::None()},
                                                                {"documents", chat::Value::None()}};
  variables.insert(variables.end(), impl_->special_tokens.begin(), impl_->special_tokens.end());
  try {
    for (auto& variable : ToValues(options.variables)) variables.push_back(std::move(variable));
    variables.emplace_back("messages", chat::Value::FromJson(messages));
    variables.emplace_back("add_generation_prompt",
                           chat::Value::Bool(options.add_generation_prompt));
    const std::function<std::tm()> now = options.now ? options.now : LocalTime;
    const uint64_t input_bytes = CountBytes(messages) + CountBytes(options.variables);
    chat::RenderedText rendered =
        chat::Interpret(parsed.block, std::move(variables), now, input_bytes);
    return {std::move(rendered.text), std::move(rendered.generated)};
  } catch (const chat::Problem& problem) {
    ThrowProblem(parsed.origin, problem);
  } catch (const chat::Refusal& refusal) {
    throw UsageError(refusal.what(), "the chat template refuses these messages: " + parsed.origin);
  }
}

bool ChatTemplate::marks_generation() const {
  return impl_->marks_generation;
}

}  // namespace winnow
