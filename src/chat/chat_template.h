// The chat template of a model: from messages to the text the model was trained on. A Jinja
// template as transformers renders it (docs/FORMATS.md lists what is supported), read from the
// model's folder. Called by cli/ (tokenize, calibration and training on conversations). The text
// holds its special tokens, BOS too: encode it with Tokenizer::Encode(text, false).
#pragma once

#include <cstdint>
#include <ctime>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/file.h"  // fs
#include "base/json.h"  // OrderedJson

namespace winnow {

struct ChatOptions {
  bool add_generation_prompt = true;
  // Further variables of the template, such as `enable_thinking` or `tools`.
  OrderedJson variables = OrderedJson::object();
  // Local time for the template's strftime_now; the clock's if empty.
  std::function<std::tm()> now = {};
};

// Rendered messages, and what the template marks as written by the model.
struct RenderedChat {
  std::string text;
  // [begin, end) in bytes of each {% generation %} block, in order.
  std::vector<std::pair<size_t, size_t>> generated;
};

// Immutable: may be copied, and used by several threads at once.
class ChatTemplate {
 public:
  // The template of a model folder: chat_template.jinja, else `chat_template` in
  // tokenizer_config.json (text, or a list of {name, template} with "default", and "tool_use" where
  // tools are given), else in chat_template.json; nothing if there is none. ModelError if it cannot
  // be parsed or uses what is not supported: `FILE: chat template line 12: filter "foo" ...`.
  static std::optional<ChatTemplate> Load(const fs::path& model_folder);
  // `origin` begins messages. `special_tokens`: {"bos_token": "<s>", ...}, variables of the
  // template.
  static ChatTemplate Parse(std::string source, std::string origin, OrderedJson special_tokens);

  // `messages`: a JSON array of {"role", "content", ...}. UsageError with the template's own
  // message if it refuses them (raise_exception), or if they are no array of objects; ModelError if
  // the template fails at them or exceeds its limits of time, memory and depth.
  std::string Render(const OrderedJson& messages, const ChatOptions& options) const;
  RenderedChat RenderMarked(const OrderedJson& messages, const ChatOptions& options) const;
  // True if the template marks the model's turns with {% generation %}.
  bool marks_generation() const;

 private:
  struct Impl;
  explicit ChatTemplate(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

}  // namespace winnow
