#include "interactive.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <iostream>

#include "base/error.h"

namespace winnow::cli {
namespace {

constexpr const char* kHelp =
    "/new           forget the conversation\n"
    "/system TEXT   another system message, and forget the conversation\n"
    "/stats         show speeds after every answer, or stop it\n"
    "/exit          leave (also Ctrl-D); Ctrl-C ends an answer";

// One conversation: what was said so far, as messages or as plain text.
class Conversation {
 public:
  Conversation(const Tokenizer& tokenizer, const ConversationStart& start)
      : tokenizer_(tokenizer), start_(start), system_(start.system) {
    Forget();
  }

  void Forget() {
    messages_ = OrderedJson::array();
    text_.clear();
    if (!system_.empty()) messages_.push_back({{"role", "system"}, {"content", system_}});
  }
  void SetSystem(std::string system) {
    system_ = std::move(system);
    Forget();
  }
  void Ask(const std::string& line) {
    messages_.push_back({{"role", "user"}, {"content", line}});
    text_ += line;
  }
  // What Ask added is taken back.
  void TakeBack(const std::string& line) {
    messages_.erase(messages_.size() - 1);
    text_.erase(text_.size() - line.size());
  }
  void Answered(const std::string& answer) {
    messages_.push_back({{"role", "assistant"}, {"content", answer}});
    text_ += answer + "\n";
  }
  std::vector<int32_t> Prompt() const {
    return start_.chat_template ? ChatPrompt(*start_.chat_template, tokenizer_, messages_)
                                : tokenizer_.Encode(text_, true);
  }

 private:
  const Tokenizer& tokenizer_;
  const ConversationStart& start_;
  std::string system_, text_;
  OrderedJson messages_;
};

// The next line; nothing at the end of the input. Ctrl-C here ends the program.
std::optional<std::string> NextLine(bool terminal) {
  const EndOnInterrupt end_on_interrupt;
  if (terminal) {
    std::fputs("> ", stdout);
    std::fflush(stdout);
  }
  std::string line;
  if (!std::getline(std::cin, line)) return std::nullopt;
  if (line.ends_with('\r')) line.pop_back();
  return line;
}

}  // namespace

std::vector<int32_t> ChatPrompt(const ChatTemplate& chat_template, const Tokenizer& tokenizer,
                                const OrderedJson& messages) {
  return tokenizer.Encode(chat_template.Render(messages, {}), false);
}

int RunInteractive(Session& session, const Tokenizer& tokenizer, TextAnswerer& answerer,
                   const ConversationStart& start) {
  const bool terminal = isatty(STDIN_FILENO) != 0 && isatty(STDOUT_FILENO) != 0;
  if (!start.chat_template) {
    session.Note("no chat template: lines are continued as plain text");
  }
  if (terminal) session.Note("/help lists what else can be said; Ctrl-D leaves");
  Conversation conversation(tokenizer, start);
  bool stats = start.stats;
  while (const std::optional<std::string> line = NextLine(terminal)) {
    if (line->empty()) continue;
    if (*line == "/exit") break;
    if (*line == "/help") {
      session.Note(kHelp);
    } else if (*line == "/new") {
      conversation.Forget();
    } else if (*line == "/stats") {
      stats = !stats;
    } else if (line->starts_with("/system ")) {
      conversation.SetSystem(line->substr(8));
    } else if (line->starts_with('/')) {
      session.Note(fmt::format("no command {}; /help lists them", *line));
    } else {
      conversation.Ask(*line);
      std::string shown;
      try {
        const std::vector<int32_t> prompt = conversation.Prompt();
        const TextAnswer answer = answerer.Answer(prompt, [&](const std::string& piece) {
          shown += piece;
          std::fwrite(piece.data(), 1, piece.size(), stdout);
          std::fflush(stdout);
        });
        std::fputc('\n', stdout);
        std::fflush(stdout);
        if (stats) session.Note(DescribeSpeed(prompt.size(), answer.result, true));
        conversation.Answered(answer.text);
      } catch (const InterruptedError&) {  // what was said so far stays said
        g_interrupted = false;
        std::fputc('\n', stdout);
        conversation.Answered(shown);
      } catch (const UsageError& error) {  // the template refuses, or the context is full
        session.Note(fmt::format("error: {}\nhint: {}", error.what(),
                                 error.hint().empty() ? "/new begins anew" : error.hint()));
        conversation.TakeBack(*line);
      }
    }
  }
  if (terminal) std::fputc('\n', stdout);
  return 0;
}

}  // namespace winnow::cli
