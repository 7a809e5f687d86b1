#include "calibration.h"

#include <fmt/format.h>

#include <optional>

#include "base/error.h"
#include "conversations.h"
#include "tokenizer/tokenizer.h"

namespace winnow::cli {

void AddCalibrationFlags(CLI::App& verb, CalibrationFlags& flags, bool required) {
  verb.add_option(
          "--calib", flags.sources,
          "Calibration text: .txt, .jsonl with `text`, `prompt` and `completion`, or `messages`\n"
          "(also .xz .zst .gz), or token ids in .safetensors; FILE:SHARE weighs several")
      ->required(required);
  verb.add_option("--blocks", flags.blocks.num_blocks, "Blocks over all texts (default 128)")
      ->check(WholeNumberFrom(1));
  verb.add_option("--block", flags.blocks.block_tokens, "Tokens a block (default 512)")
      ->check(WholeNumberFrom(1));
  verb.add_option("--per-document", flags.blocks.blocks_per_document,
                  "Blocks of one document at most, excerpts of long ones; 0: no limit,\nas NAEE "
                  "(default: 1 for compress and healing, 0 for observe)")
      ->check(WholeNumberFrom(0));
  verb.add_option("--seed", flags.blocks.seed, "Seed of the document shuffle (default 42)");
  verb.add_option("--field", flags.blocks.field, "Key of the text in .jsonl (default text)");
}

std::vector<SourceBlocks> LoadCalibration(const Session& session, const Model& model,
                                          const std::string& model_folder,
                                          const CalibrationFlags& flags) {
  const EndOnInterrupt reading;
  std::vector<TextSource> sources;
  bool any_text = false;
  for (const std::string& argument : flags.sources) {
    sources.push_back(ParseTextSource(argument));
    any_text = any_text || !sources.back().is_token_ids;
  }
  std::optional<Tokenizer> tokenizer;
  if (any_text) tokenizer.emplace(Tokenizer::Load(model_folder));
  ConversationEncoder conversation;
  if (tokenizer) conversation = MakeConversationEncoder(model_folder, *tokenizer);
  std::vector<SourceBlocks> blocks =
      BuildBlocks(sources, tokenizer ? &*tokenizer : nullptr, flags.blocks, conversation);
  const int64_t context = model.config().max_position_embeddings;
  for (const SourceBlocks& source : blocks) {
    for (const int32_t id : source.sequences.ids) {
      if (id >= model.config().vocab_size) {
        throw UsageError(fmt::format("{}: token id {} is outside the model's {} embedding rows",
                                     source.name, id, model.config().vocab_size),
                         "the ids were made with another tokenizer or another model");
      }
    }
    for (int64_t i = 0; context > 0 && i < source.sequences.size(); ++i) {
      const int64_t length = source.sequences.offsets[static_cast<size_t>(i) + 1] -
                             source.sequences.offsets[static_cast<size_t>(i)];
      if (length > context) {
        session.control().Warn(
            fmt::format("{}: sequences of {} tokens exceed the model's context of {}", source.name,
                        length, context));
        break;
      }
    }
  }
  return blocks;
}

}  // namespace winnow::cli
