#include "chat/chat_template.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include "base/error.h"
#include "tokenizer/tokenizer.h"

namespace winnow {
namespace {

const fs::path kData = WINNOW_TEST_DATA;

std::vector<OrderedJson> ReadLines(const fs::path& path) {
  const std::string text = ReadTextFile(path);
  std::vector<OrderedJson> lines;
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos;
       begin = end + 1) {
    lines.push_back(ParseOrderedJson(std::string_view(text).substr(begin, end - begin),
                                     path.filename().string()));
  }
  return lines;
}

OrderedJson User(const std::string& content) {
  return OrderedJson::array({{{"role", "user"}, {"content", content}}});
}

std::string Render(const std::string& source, const ChatOptions& options = {}) {
  return ChatTemplate::Parse(source, "t", {{"bos_token", "<s>"}, {"eos_token", "</s>"}})
      .Render(User("Hi"), options);
}

// The message of the ModelError that a template causes, parsed or rendered.
std::string Fault(const std::string& source) {
  try {
    return "rendered: " + Render(source);
  } catch (const ModelError& error) {
    return error.what();
  }
}

// Each of the eight tokenizers has a template in the style of its family; text, ids and refusals
// are those of the reference (tests/data/chat/README.md).
TEST(ChatTemplate, GivesTheReferenceTextAndIds) {
  int cases = 0;
  for (const char* style : {"deepseek-llm", "deepseek-v3", "gpt_oss", "llama3", "mixtral",
                            "mixtral-metaspace", "olmoe", "qwen"}) {
    SCOPED_TRACE(style);
    const fs::path folder = kData / "tokenizers" / style;
    const Tokenizer tokenizer = Tokenizer::Load(folder);
    const std::optional<ChatTemplate> chat_template = ChatTemplate::Load(folder);
    ASSERT_TRUE(chat_template.has_value());
    for (const OrderedJson& line : ReadLines(folder / "chat.jsonl")) {
      ++cases;
      const ChatOptions options{.add_generation_prompt = line["add_generation_prompt"].get<bool>()};
      if (line.contains("error")) {
        try {
          ADD_FAILURE() << "not refused: " << chat_template->Render(line["messages"], options);
        } catch (const UsageError& error) {
          EXPECT_EQ(error.what(), line["error"].get<std::string>());
        }
        continue;
      }
      const std::string text = chat_template->Render(line["messages"], options);
      EXPECT_EQ(text, line["text"].get<std::string>());
      EXPECT_EQ(tokenizer.Encode(text, false), line["ids"].get<std::vector<int32_t>>());
    }
  }
  EXPECT_EQ(cases, 48);
}

// Every construct, with what jinja2 makes of it.
TEST(ChatTemplate, RendersEveryConstructAsTheReference) {
  const OrderedJson usual =
      ParseOrderedJson(ReadTextFile(kData / "chat/variables.json"), "variables");
  int cases = 0;
  for (const OrderedJson& line : ReadLines(kData / "chat/constructs.jsonl")) {
    ++cases;
    const auto source = line["template"].get<std::string>();
    SCOPED_TRACE(source.substr(0, 200));
    ChatOptions options{.variables = line.value("variables", usual)};
    options.add_generation_prompt = options.variables.value("add_generation_prompt", false);
    const OrderedJson messages = options.variables["messages"];
    std::string text, refusal;
    bool fails = false;
    try {
      text = ChatTemplate::Parse(source, "t", {{"bos_token", "<s>"}, {"eos_token", "</s>"}})
                 .Render(messages, options);
    } catch (const UsageError& error) {
      refusal = error.what();
    } catch (const ModelError& error) {
      fails = true;
      if (!line.contains("fails")) ADD_FAILURE() << error.what();
    }
    EXPECT_EQ(text, line.value("text", ""));
    EXPECT_EQ(refusal, line.value("refuses", ""));
    EXPECT_EQ(fails, line.value("fails", false));
  }
  EXPECT_EQ(cases, 80);
}

TEST(ChatTemplate, NamesWhatItDoesNotSupport) {
  const std::pair<const char*, const char*> cases[] = {
      {"\n\n{{ x | foo }}", "t: chat template line 3: filter \"foo\" is not supported"},
      {"{{ x is foo }}", "t: chat template line 1: test \"foo\" is not supported"},
      {"{% include 'x' %}", "t: chat template line 1: statement \"include\" is not supported"},
      {"a\n{% block x %}{% endblock %}",
       "t: chat template line 2: statement \"block\" is not supported"},
      {"{{ 'a'.format(1) }}",
       "t: chat template line 1: method \"format\" of a string is not supported"},
      {"{{ messages.append(1) }}",
       "t: chat template line 1: method \"append\" of a list is not supported"},
      {"{{ cycler(1) }}", "t: chat template line 1: function \"cycler\" is not supported"},
      {"{% for x in y recursive %}{% endfor %}",
       "t: chat template line 1: \"recursive\" loops are not supported"},
      {"{% for x in [1] %}\n{{ loop.changed(x) }}{% endfor %}",
       "t: chat template line 2: loop.changed is not supported"},
      {"{% for x in y %}{% macro m() %}{% endmacro %}{% endfor %}",
       "t: chat template line 1: macro \"m\" inside another block is not supported"}};
  for (const auto& [source, message] : cases) EXPECT_EQ(Fault(source), message);
}

TEST(ChatTemplate, SaysWhatIsWrongAndInWhichLine) {
  const std::pair<const char*, const char*> cases[] = {
      {"{% if x %}\n", "t: chat template line 1: if has no elif or else or endif"},
      {"{{ x ", "t: chat template line 1: a tag is not closed with }}"},
      {"a\n{# x", "t: chat template line 2: a comment has no end"},
      {"{{ 'x }}", "t: chat template line 1: a string has no end"},
      {"{{ (1 }}", "t: chat template line 1: unexpected \"}\""},
      {"{% endif %}", "t: chat template line 1: unexpected endif"},
      {"{{ 1 + }}", "t: chat template line 1: expected a value, got the end of a tag"},
      {"{% break %}", "t: chat template line 1: break outside of a loop"},
      {"{{ messages[0]\n.name.first }}",
       "t: chat template line 2: a dictionary has no attribute \"name\""},
      {"\n{{ nobody.x }}", "t: chat template line 2: \"nobody\" is undefined"},
      {"{{ 'a' + 1 }}", "t: chat template line 1: \"+\" cannot take a string and an integer"},
      {"{{ 9223372036854775807 + 1 }}", "t: chat template line 1: a number does not fit 64 bits"},
      {"{{ 99999999999999999999 }}",
       "t: chat template line 1: the number 99999999999999999999 does not fit 64 bits"},
      {"{{ trim('x') }}", "t: chat template line 1: \"trim\" is undefined"},
      {"{{ 'x' | trim(1, 2) }}",
       "t: chat template line 1: trim takes at most 1 arguments, 2 are given"}};
  for (const auto& [source, message] : cases) EXPECT_EQ(Fault(source), message);
  EXPECT_THROW(ChatTemplate::Parse("\xff", "t", {}), ModelError);
  EXPECT_THROW(ChatTemplate::Parse("x", "t", {}).Render({{"role", "user"}}, {}), UsageError);
}

// A stranger's template ends with a message, however it tries not to.
TEST(ChatTemplate, HostileTemplatesEnd) {
  std::string open, close, chain = "x", nots, blocks, maps;
  for (int i = 0; i < 100'000; ++i) {
    open += "(";
    close += ")";
    chain += ".a";
    nots += "not ";
    maps += ", 'map'";
  }
  for (int i = 0; i < 1000; ++i) blocks += "{% if 1 %}";
  const std::pair<std::string, const char*> cases[] = {
      {"{{ " + open + "1" + close + " }}", "nested deeper than 200"},
      {"{{ " + chain + " }}", "nested deeper than 200"},
      {"{{ " + nots + "1 }}", "nested deeper than 200"},
      {blocks, "blocks are nested deeper than 60"},
      {"{{ [1] | map('map'" + maps + ") }}", "more than 100 arguments"},
      {"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls are nested too deeply"},
      {"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
       "too many steps"},
      {"{{ range(999999999) }}", "a range has more than 100000 items"},
      {"{% set n = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
       "{% endfor %}",
       "too much text"},
      {"{{ 'aaaa' * 4611686018427387904 }}", "too much text"},
      {"{{ [1] * 9000000000000000000 }}", "too many steps"},
      {"{% set n = namespace(l=[1]) %}{% for i in range(99) %}{% set n.l = [n.l, n.l] %}"
       "{% endfor %}{{ n.l }}",
       "too many steps"},
      {"{% set n = namespace(l=[1]) %}{% for i in range(999) %}{% set n.l = [n.l] %}{% endfor %}",
       "nested deeper than 100"},
      {"{{ ('a' * 99999).replace('a', 'b' * 99999) }}", "too much text"},
      {"{{ 1 | tojson(indent='x' * 99999) ~ ([[[1]]] * 99999) | tojson(indent='x' * 99999) }}",
       "too much text"},
      {"{{ strftime_now('%c' * 9999) }}", "strftime_now writes more than 1024 bytes"}};
  for (const auto& [source, message] : cases) {
    const std::string fault = Fault(source);
    EXPECT_NE(fault.find(message), std::string::npos) << source.substr(0, 80) << "\n" << fault;
  }
  // What refers to itself neither leaks nor hangs.
  EXPECT_EQ(Render("{% set n = namespace() %}{% set n.n = n %}{% set n.l = [n] %}{{ n.n == n }}"),
            "True");
  EXPECT_EQ(Render("{% set n = namespace() %}{% for x in [1] %}{% set n.l = loop %}{% endfor %}"
                   "{{ n.l.index }}"),
            "1");
}

TEST(ChatTemplate, TellsTheTimeItIsGiven) {
  const auto now = [] {
    std::tm time{};
    time.tm_year = 124;
    time.tm_mon = 6;
    time.tm_mday = 9;
    return time;
  };
  EXPECT_EQ(Render("{{ strftime_now('%d %b %Y') }}|{{ strftime_now('') }}", {.now = now}),
            "09 Jul 2024|");
}

TEST(ChatTemplate, KnowsWhatTheModelWrote) {
  const RenderedChat chat = ChatTemplate::Parse(
                                "{% for m in messages %}<{% generation %}{{ m.content }}!"
                                "{% endgeneration %}>{% endfor %}",
                                "t", {})
                                .RenderMarked(User("Hi"), {});
  EXPECT_EQ(chat.text, "<Hi!>");
  EXPECT_EQ(chat.generated, (std::vector<std::pair<size_t, size_t>>{{1, 4}}));
}

class LoadTest : public testing::Test {
 protected:
  LoadTest() {
    std::string name = (fs::temp_directory_path() / "winnow_test_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw RuntimeError("cannot create " + name);
    folder_ = name;
  }
  ~LoadTest() override { fs::remove_all(folder_); }
  void Write(const char* name, const std::string& text) {
    WriteFileAtomically(folder_ / name, text);
  }
  std::string Rendered(const ChatOptions& options = {}) {
    return ChatTemplate::Load(folder_)->Render(User("Hi"), options);
  }
  fs::path folder_;
};

TEST_F(LoadTest, TakesTheTemplateWhereTransformersDoes) {
  EXPECT_FALSE(ChatTemplate::Load(folder_).has_value());
  Write("tokenizer_config.json", R"({"bos_token": "<s>"})");
  EXPECT_FALSE(ChatTemplate::Load(folder_).has_value());
  Write("chat_template.json", R"({"chat_template": "json {{ bos_token }}"})");
  EXPECT_EQ(Rendered(), "json <s>");
  Write("tokenizer_config.json",
        R"({"bos_token": {"content": "<b>"}, "eos_token": null, "tokenizer_class": "LlamaTokenizer",
            "chat_template": [{"name": "tool_use", "template": "tools"},
                              {"name": "default", "template": "{{ bos_token }}{{ eos_token }}"}]})");
  EXPECT_EQ(Rendered(), "<b>");
  EXPECT_EQ(Rendered({.variables = {{"tools", OrderedJson::array({1})}}}), "tools");
  Write("chat_template.jinja", "jinja {{ messages[0].content }}");
  EXPECT_EQ(Rendered(), "jinja Hi");
}

TEST_F(LoadTest, LeftOutTokensComeFromTheMapAndTheClass) {
  Write("special_tokens_map.json", R"({"eos_token": {"content": "</e>"}})");
  Write("tokenizer_config.json", R"({"tokenizer_class": "LlamaTokenizerFast",
    "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}"})");
  EXPECT_EQ(Rendered(), "<s></e>False");
}

TEST_F(LoadTest, RefusesWhatIsNoTemplate) {
  Write("tokenizer_config.json", R"({"chat_template": 5})");
  EXPECT_THROW(ChatTemplate::Load(folder_), ModelError);
  Write("tokenizer_config.json", R"({"chat_template": [{"name": "rag", "template": ""}]})");
  EXPECT_THROW(ChatTemplate::Load(folder_), ModelError);
  Write("tokenizer_config.json", R"({"chat_template": "", "bos_token": 5})");
  EXPECT_THROW(ChatTemplate::Load(folder_), ModelError);
}

}  // namespace
}  // namespace winnow
