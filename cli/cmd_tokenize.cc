// winnow tokenize: text to ids and back, and conversations to what the model reads.
#include <fmt/format.h>

#include <fstream>
#include <functional>
#include <iostream>

#include "base/error.h"
#include "base/file.h"
#include "chat/conversation.h"
#include "conversations.h"
#include "session.h"
#include "tokenizer/tokenizer.h"

namespace winnow::cli {
namespace {

struct TokenizeFlags {
  std::string path, jsonl, chat, text;
  bool plain = false;
};

OrderedJson Tokenise(const Tokenizer& tokenizer, const std::string& text) {
  const std::vector<int32_t> ids = tokenizer.Encode(text, false);
  return {{"ids", ids},
          {"ids_special", tokenizer.Encode(text, true)},
          {"decoded", tokenizer.Decode(ids, false)}};
}

// Every line of a file, or of standard input for "-", that is not empty; `where` is FILE:NUMBER.
void ForEachLine(
    const std::string& path,
    const std::function<void(const std::string& line, const std::string& where)>& use) {
  std::ifstream file;
  if (path != "-") {
    file.open(path);
    if (!file) throw RuntimeError(fmt::format("cannot open {}", path), "check the path");
  }
  std::istream& in = path == "-" ? std::cin : file;
  std::string line;
  for (int64_t number = 1; std::getline(in, line); ++number) {
    if (!line.empty()) use(line, fmt::format("{}:{}", path, number));
  }
}

void PrintText(Session& session, const Tokenizer& tokenizer, const std::string& text) {
  if (session.flags.json) {
    session.PrintJson(Tokenise(tokenizer, text));
    return;
  }
  for (const int32_t id : tokenizer.Encode(text, true)) {
    session.Print(fmt::format("{:>8}  {}", id, tokenizer.IdToToken(id)));
  }
}

void PrintLines(Session& session, const Tokenizer& tokenizer, const std::string& path) {
  ForEachLine(path, [&](const std::string& line, const std::string& where) {
    const Json json = ParseJson(line, where);
    if (!json.is_object() || !json.contains("text") || !json["text"].is_string()) {
      throw ModelError(fmt::format("{}: expected an object with a string \"text\"", where));
    }
    session.PrintJson(Tokenise(tokenizer, json["text"].get<std::string>()));
  });
}

// What the template makes of a conversation, or why it refuses it: both are results.
OrderedJson RenderLine(const ChatTemplate& chat_template, const Tokenizer& tokenizer,
                       const Conversation& conversation) {
  try {
    std::string text = chat_template.Render(
        conversation.messages, {.add_generation_prompt = conversation.add_generation_prompt,
                                .variables = conversation.variables});
    // The template has written the special tokens, BOS too.
    std::vector<int32_t> ids = tokenizer.Encode(text, false);
    return {{"text", std::move(text)}, {"ids", std::move(ids)}};
  } catch (const UsageError& error) {
    return {{"error", error.what()}};
  } catch (const ModelError& error) {
    return {{"error", error.what()}};
  }
}

void PrintChats(Session& session, const Tokenizer& tokenizer, const TokenizeFlags& flags) {
  const ChatTemplate chat_template = LoadChatTemplate(flags.path);
  ForEachLine(flags.chat, [&](const std::string& line, const std::string& where) {
    const OrderedJson result =
        RenderLine(chat_template, tokenizer, ConversationFromJson(line, where));
    if (!flags.plain || session.flags.json) {
      session.PrintJson(result);
    } else if (result.contains("error")) {
      throw ModelError(fmt::format("{}: {}", where, result["error"].get<std::string>()),
                       "the chat template refuses these messages");
    } else {
      session.Print(result["text"].get<std::string>());
    }
  });
}

int RunTokenize(Session& session, const TokenizeFlags& flags) {
  if (flags.jsonl.empty() + flags.text.empty() + flags.chat.empty() != 2) {
    throw UsageError("give one of -p TEXT, --jsonl FILE and --chat FILE",
                     "winnow tokenize MODEL -p \"some text\" shows its ids and pieces");
  }
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("tokenizer", Tokenizer::EstimateBytes(flags.path));
  session.RequireMemory(memory, "tokenize");
  const Tokenizer tokenizer = Tokenizer::Load(flags.path);
  if (!flags.text.empty()) PrintText(session, tokenizer, flags.text);
  if (!flags.jsonl.empty()) PrintLines(session, tokenizer, flags.jsonl);
  if (!flags.chat.empty()) PrintChats(session, tokenizer, flags);
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
  CLI::Option* chat = verb->add_option(
      "--chat", flags->chat,
      "File with {\"messages\": [{\"role\", \"content\"}, ...]} a line (- for stdin), rendered by "
      "the\nmodel's chat template; prints {\"text\", \"ids\"} or {\"error\"} a line. Other keys of "
      "a "
      "line are\nadd_generation_prompt (default false) and variables of the template "
      "(enable_thinking, tools)");
  verb->add_flag("--plain", flags->plain, "With --chat: print the rendered text alone")
      ->needs(chat);
  session.AddMemoryFlag(*verb);
  session.AddReportFlags(*verb);
  verb->footer(
      "Example: winnow tokenize MODEL -p \"Once upon a time\"\n"
      "         winnow tokenize MODEL --chat conversations.jsonl --plain");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunTokenize(session, *flags); };
  });
}

}  // namespace winnow::cli
