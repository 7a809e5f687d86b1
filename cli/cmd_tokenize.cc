// winnow tokenize: text to ids and back.
#include <fmt/format.h>

#include <fstream>
#include <iostream>

#include "base/error.h"
#include "base/file.h"
#include "session.h"
#include "tokenizer/tokenizer.h"

namespace winnow::cli {
namespace {

struct TokenizeFlags {
  std::string path, jsonl, text;
};

OrderedJson Tokenise(const Tokenizer& tokenizer, const std::string& text) {
  const std::vector<int32_t> ids = tokenizer.Encode(text, false);
  return {{"ids", ids},
          {"ids_special", tokenizer.Encode(text, true)},
          {"decoded", tokenizer.Decode(ids, false)}};
}

int RunTokenize(Session& session, const TokenizeFlags& flags) {
  if (flags.jsonl.empty() == flags.text.empty()) {
    throw UsageError("give either -p TEXT or --jsonl FILE");
  }
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("tokenizer", Tokenizer::EstimateBytes(flags.path));
  session.RequireMemory(memory, "tokenize");
  const Tokenizer tokenizer = Tokenizer::Load(flags.path);
  if (!flags.text.empty()) {
    const OrderedJson line = Tokenise(tokenizer, flags.text);
    if (session.flags.json) {
      session.PrintJson(line);
      return 0;
    }
    for (const int32_t id : tokenizer.Encode(flags.text, true)) {
      session.Print(fmt::format("{:>8}  {}", id, tokenizer.IdToToken(id)));
    }
    return 0;
  }
  std::ifstream file;
  if (flags.jsonl != "-") {
    file.open(flags.jsonl);
    if (!file) throw RuntimeError(fmt::format("cannot open {}", flags.jsonl), "check the path");
  }
  std::istream& in = flags.jsonl == "-" ? std::cin : file;
  std::string line;
  for (int64_t number = 1; std::getline(in, line); ++number) {
    if (line.empty()) continue;
    const std::string where = fmt::format("{}:{}", flags.jsonl, number);
    const Json json = ParseJson(line, where);
    if (!json.is_object() || !json.contains("text") || !json["text"].is_string()) {
      throw ModelError(fmt::format("{}: expected an object with a string \"text\"", where));
    }
    session.PrintJson(Tokenise(tokenizer, json["text"].get<std::string>()));
  }
  return 0;
}

}  // namespace

void AddTokenize(CLI::App& app, Session& session) {
  auto flags = std::make_shared<TokenizeFlags>();
  CLI::App* verb = app.add_subcommand("tokenize", "Text to token ids");
  verb->add_option("PATH", flags->path, "Folder with tokenizer.json, or the file")->required();
  verb->add_option("-p,--prompt", flags->text, "Text to tokenise");
  verb->add_option("--jsonl", flags->jsonl,
                   "File with {\"text\": ...} a line (- for stdin); prints a line each");
  session.AddMemoryFlag(*verb);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow tokenize MODEL -p \"Once upon a time\"");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunTokenize(session, *flags); };
  });
}

}  // namespace winnow::cli
