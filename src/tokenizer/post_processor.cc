#include "tokenizer/post_processor.h"

#include <fmt/format.h>

#include "tokenizer/json_fields.h"

namespace winnow::tok {
namespace {

// TemplateProcessing.single: [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}, ...].
PostProcessor ParseTemplate(const Fields& fields) {
  PostProcessor result;
  bool seen_text = false;
  for (const Json& piece : fields.Array("single")) {
    const Fields entry(piece, fields.where() + ".single");
    if (entry.Find("Sequence") != nullptr) {
      const Fields sequence(entry.Get("Sequence"), entry.where());
      if (sequence.String("id") != "A") entry.Fail("Sequence must be A in \"single\"");
      if (seen_text) entry.Fail("the text appears twice");
      seen_text = true;
      continue;
    }
    const Fields special(entry.Get("SpecialToken"), entry.where());
    const std::string name = special.String("id");
    const Fields tokens(fields.Get("special_tokens"), fields.where() + ".special_tokens");
    const Fields token(tokens.Get(name.c_str()), tokens.where());
    for (const Json& id : token.Array("ids")) {
      (seen_text ? result.suffix : result.prefix).push_back(TokenId(id, token.where()));
    }
  }
  if (!seen_text) fields.Fail("\"single\" drops the text");
  return result;
}

// "cls" and "sep" of the Bert kinds: ["<s>", 0].
int32_t PairId(const Fields& fields, const char* name) {
  const Json& pair = fields.Array(name);
  if (pair.size() != 2) fields.Fail(fmt::format("\"{}\" must be [token, id]", name));
  return TokenId(pair[1], fields.where());
}

}  // namespace

PostProcessor PostProcessor::FromJson(const Json& json, const std::function<bool(int32_t)>& has_id,
                                      const std::string& where) {
  const Fields fields(json, where);
  const std::string type = fields.String("type");
  PostProcessor result;
  if (type == "Sequence") {
    bool adds_tokens = false;
    int index = 0;
    for (const Json& step : fields.Array("processors")) {
      const PostProcessor processor =
          FromJson(step, has_id, fmt::format("{}.processors[{}]", where, index++));
      if (processor.prefix.empty() && processor.suffix.empty()) continue;
      if (adds_tokens) fields.Fail("more than one processor adds tokens");
      adds_tokens = true;
      result = processor;
    }
  } else if (type == "TemplateProcessing") {
    result = ParseTemplate(fields);
  } else if (type == "BertProcessing" || type == "RobertaProcessing") {
    result.prefix.push_back(PairId(fields, "cls"));
    result.suffix.push_back(PairId(fields, "sep"));
  } else if (type != "ByteLevel") {
    fields.Fail(fmt::format("post-processor \"{}\" is not supported", type.substr(0, 60)));
  }
  for (const std::vector<int32_t>* ids : {&result.prefix, &result.suffix}) {
    for (const int32_t id : *ids) {
      if (!has_id(id)) fields.Fail(fmt::format("there is no token with id {}", id));
    }
  }
  return result;
}

}  // namespace winnow::tok
