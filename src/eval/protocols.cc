#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "eval/perplexity.h"

namespace winnow {

std::vector<PerplexityProtocol> AllProtocols() {
  return {
      {.name = "bos-512",
       .description =
           "documents tokenised apart and closed by EOS; blocks of 512 fed as BOS + 511, all "
           "512 scored"},
      {.name = "plain-512",
       .bos = false,
       .description = "as bos-512 without BOS; the last 511 of each block are scored"},
      {.name = "gptq-wikitext2-2048",
       .window = 2048,
       .bos = false,
       .join_documents = true,
       .description =
           "documents joined by an empty line and tokenised once; blocks of 2,048, every "
           "next token inside a block scored (GPTQ, SparseGPT, Wanda)"},
      {.name = "llamacpp-512",
       .half = true,
       .join_documents = true,
       .description =
           "text tokenised once; chunks of 512 whose first token is replaced by BOS, the "
           "second half scored (llama.cpp perplexity)"},
  };
}

PerplexityProtocol FindProtocol(const std::string& name) {
  std::string known;
  for (const PerplexityProtocol& protocol : AllProtocols()) {
    if (protocol.name == name) return protocol;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", protocol.name);
  }
  throw UsageError(fmt::format("--protocol: \"{}\" is not known", name), "use one of: " + known);
}

namespace {

struct TokenisedText {
  std::vector<int32_t> ids;
  uint64_t bytes = 0;  // of the text the ids stand for
};

// Tokens of the documents one after the other, each closed by EOS, until `enough` are there.
TokenisedText TokeniseDocuments(const TextSource& source, const std::string& field,
                                const Tokenizer& tokenizer, const ModelTokens& tokens,
                                int64_t enough) {
  TokenisedText text;
  ReadDocuments(source, field, [&](std::string document) {
    const std::vector<int32_t> ids = tokenizer.Encode(document, false);
    const auto room = enough - static_cast<int64_t>(text.ids.size());
    if (static_cast<int64_t>(ids.size()) > room) {  // the last document is cut: so are its bytes
      const std::span<const int32_t> part = std::span(ids).first(static_cast<size_t>(room));
      text.ids.insert(text.ids.end(), part.begin(), part.end());
      text.bytes += tokenizer.Decode(part, false).size();
      return false;
    }
    text.ids.insert(text.ids.end(), ids.begin(), ids.end());
    text.bytes += document.size();
    if (tokens.eos && static_cast<int64_t>(ids.size()) < room) text.ids.push_back(*tokens.eos);
    return static_cast<int64_t>(text.ids.size()) < enough;
  });
  return text;
}

TokenisedText TokeniseJoined(const TextSource& source, const std::string& field,
                             const Tokenizer& tokenizer) {
  std::string all;
  ReadDocuments(source, field, [&](std::string document) {
    if (!all.empty()) all += "\n\n";
    all += document;
    return true;
  });
  return {tokenizer.Encode(all, true), all.size()};
}

}  // namespace

ScoredWindows WindowsOfText(const TextSource& source, const std::string& field,
                            const Tokenizer& tokenizer, const ModelTokens& tokens,
                            const PerplexityProtocol& protocol, int64_t max_tokens) {
  if (protocol.bos && !tokens.bos) {
    throw UsageError(
        fmt::format("protocol {} needs a BOS token and this model has none", protocol.name),
        "use --protocol plain-512");
  }
  const int64_t enough = max_tokens > 0 ? max_tokens : INT64_MAX;
  const TokenisedText text = protocol.join_documents
                                 ? TokeniseJoined(source, field, tokenizer)
                                 : TokeniseDocuments(source, field, tokenizer, tokens, enough);
  const int64_t w = protocol.window;
  const int64_t available = std::min<int64_t>(static_cast<int64_t>(text.ids.size()), enough);
  const int64_t windows = available / w;
  if (windows == 0) {
    throw UsageError(fmt::format("{}: {} tokens are less than one window of {}",
                                 source.path.string(), available, w),
                     "give a longer text or another --protocol");
  }
  ScoredWindows out;
  for (int64_t i = 0; i < windows; ++i) {
    const std::span<const int32_t> block =
        std::span(text.ids).subspan(static_cast<size_t>(i * w), static_cast<size_t>(w));
    std::vector<int32_t> input(block.begin(), block.end());
    std::vector<int32_t> target(static_cast<size_t>(w), -1);
    if (protocol.bos &&
        !protocol.half) {  // BOS + all but the last; every token of the block scored
      std::copy(block.begin(), block.end() - 1, input.begin() + 1);
      input[0] = *tokens.bos;
      std::copy(block.begin(), block.end(), target.begin());
    } else {
      if (protocol.bos) input[0] = *tokens.bos;
      for (int64_t j = protocol.half ? w / 2 : 0; j + 1 < w; ++j) {
        target[static_cast<size_t>(j)] = block[static_cast<size_t>(j) + 1];
      }
    }
    out.inputs.Append(input);
    out.scored += static_cast<int64_t>(
        std::count_if(target.begin(), target.end(), [](int32_t id) { return id >= 0; }));
    out.targets.insert(out.targets.end(), target.begin(), target.end());
  }
  // Bytes stand for all ids; scale to those scored (exact when a whole text is scored).
  out.bytes =
      static_cast<uint64_t>(static_cast<double>(text.bytes) * static_cast<double>(out.scored) /
                            static_cast<double>(text.ids.size()));
  return out;
}

ScoredWindows WindowsOfIds(const TokenSequences& rows) {
  ScoredWindows out;
  for (int64_t i = 0; i < rows.size(); ++i) {
    const auto begin = static_cast<size_t>(rows.offsets[static_cast<size_t>(i)]);
    const auto end = static_cast<size_t>(rows.offsets[static_cast<size_t>(i) + 1]);
    if (end - begin < 2) continue;
    const std::span<const int32_t> row = std::span(rows.ids).subspan(begin, end - begin);
    out.inputs.Append(row);
    out.targets.insert(out.targets.end(), row.begin() + 1, row.end());
    out.targets.push_back(-1);
    out.scored += static_cast<int64_t>(row.size()) - 1;
  }
  if (out.scored == 0) throw UsageError("the id file has no row of two tokens or more");
  return out;
}

}  // namespace winnow
