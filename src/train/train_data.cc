#include "train/train_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/json.h"
#include "checkpoint/safetensors_file.h"
#include "text/block_builder.h"

namespace winnow {
namespace {

std::vector<uint8_t> ReadAttentionMask(const SafetensorsFile& file, const TensorInfo& mask) {
  const TensorInfo& ids = file.Get("input_ids");
  const std::string where = file.path().string();
  if (mask.shape != ids.shape || (mask.dtype != Dtype::kI64 && mask.dtype != Dtype::kI32 &&
                                  mask.dtype != Dtype::kU8 && mask.dtype != Dtype::kBool)) {
    throw ModelError(fmt::format("{}: attention_mask is {}, input_ids is {}", where,
                                 mask.Describe(), ids.Describe()),
                     "expected whole numbers, one for each token id");
  }
  const size_t width = DtypeBits(mask.dtype) / 8;
  std::vector<std::byte> bytes(static_cast<size_t>(mask.bytes));
  file.Read(mask, bytes);
  std::vector<uint8_t> values(bytes.size() / width);
  for (size_t i = 0; i < values.size(); ++i) {
    int64_t value = 0;
    std::memcpy(&value, bytes.data() + i * width, width);
    if (value != 0 && value != 1) {
      throw ModelError(
          fmt::format("{}: attention_mask[{}] is {}, expected 0 or 1", where, i, value));
    }
    values[i] = static_cast<uint8_t>(value);
  }
  return values;
}

template <class T>
std::vector<T> Part(const std::vector<T>& all, int64_t begin, int64_t end) {
  if (all.empty()) return {};
  return {all.begin() + begin, all.begin() + end};
}

template <class T>
void KeepMarked(std::vector<T>& values, const std::vector<uint8_t>& mask) {
  if (values.empty()) return;
  size_t kept = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (mask[i] != 0) values[kept++] = values[i];
  }
  values.resize(kept);
}

}  // namespace

std::vector<TrainRow> ReadTrainRows(const fs::path& path, bool keep_padding) {
  const TokenSequences all = ReadTokenIds(path);
  const SafetensorsFile file = SafetensorsFile::Open(path);
  std::vector<uint8_t> mask;
  if (const TensorInfo* tensor = file.Find("attention_mask")) {
    mask = ReadAttentionMask(file, *tensor);
  }
  std::vector<TrainRow> rows;
  for (int64_t i = 0; i < all.size(); ++i) {
    const int64_t begin = all.offsets[static_cast<size_t>(i)];
    const int64_t end = all.offsets[static_cast<size_t>(i) + 1];
    TrainRow row{Part(all.ids, begin, end), Part(all.weights, begin, end), Part(mask, begin, end)};
    if (!row.mask.empty() && !keep_padding) {
      KeepMarked(row.ids, row.mask);
      KeepMarked(row.weights, row.mask);
      row.mask.clear();
    }
    if (row.ids.size() < 2) {
      throw UsageError(fmt::format("{}: row {} has {} tokens", path.string(), i, row.ids.size()),
                       "a row needs two tokens: one to read, one to predict");
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

std::vector<TrainRow> RowsOfText(const TextSource& source, const Tokenizer& tokenizer,
                                 const TrainTextOptions& options) {
  const auto most = static_cast<size_t>(options.block_tokens);
  std::vector<TrainRow> rows;
  std::vector<int32_t> pending;
  const auto encode = [&](std::string_view text, bool with_special) {
    return tokenizer.Encode(text, with_special);
  };
  ReadPromptedDocuments(source, options.field, [&](Document document) {
    if (document.prompt_bytes > 0 || document.is_conversation) {
      CountedIds tokens = EncodeDocument(document, encode, options.conversation);
      // A chat template ends an answer itself.
      if (options.end && !document.is_conversation) {
        tokens.ids.push_back(*options.end);
        tokens.weights.push_back(1.0f);
      }
      if (tokens.ids.size() > most) {
        tokens.ids.resize(most);
        tokens.weights.resize(most);
      }
      TrainRow row{std::move(tokens.ids)};
      if (!options.prompt_counts) {
        const auto counts = [](float weight) { return weight > 0; };
        // Nothing predicts a row's first token.
        if (tokens.weights.size() < 2 ||
            std::none_of(tokens.weights.begin() + 1, tokens.weights.end(), counts)) {
          return true;  // nothing of the answers is left
        }
        row.weights = std::move(tokens.weights);
      }
      if (row.ids.size() > 1) rows.push_back(std::move(row));
      return true;
    }
    const std::vector<int32_t> ids = tokenizer.Encode(document.text, true);
    pending.insert(pending.end(), ids.begin(), ids.end());
    size_t used = 0;
    for (; used + most <= pending.size(); used += most) {
      TrainRow row;
      row.ids.assign(pending.begin() + static_cast<std::ptrdiff_t>(used),
                     pending.begin() + static_cast<std::ptrdiff_t>(used + most));
      rows.push_back(std::move(row));
    }
    pending.erase(pending.begin(), pending.begin() + static_cast<std::ptrdiff_t>(used));
    return true;
  });
  if (rows.empty() && pending.size() > 1) {
    rows.emplace_back();
    rows.back().ids = std::move(pending);
  }
  return rows;
}

std::vector<int32_t> HeldOutRows(int64_t num_rows, double share) {
  std::vector<int32_t> rows;
  for (int64_t i = 0; i < num_rows; ++i) {
    if (std::floor(static_cast<double>(i + 1) * share) >
        std::floor(static_cast<double>(i) * share)) {
      rows.push_back(static_cast<int32_t>(i));
    }
  }
  return rows;
}

std::vector<std::vector<int32_t>> ShuffledSteps(const std::vector<int32_t>& rows, int64_t batch,
                                                int64_t epochs, uint64_t seed, int64_t most_steps) {
  std::vector<std::vector<int32_t>> steps;
  const auto count = static_cast<int64_t>(rows.size());
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    const std::vector<int64_t> order = NumpyPermutation(seed + static_cast<uint64_t>(epoch), count);
    for (int64_t first = 0; first < count; first += batch) {
      if (most_steps > 0 && std::ssize(steps) == most_steps) return steps;
      steps.emplace_back();
      for (int64_t i = first; i < std::min(count, first + batch); ++i) {
        steps.back().push_back(rows[static_cast<size_t>(order[static_cast<size_t>(i)])]);
      }
    }
  }
  return steps;
}

std::vector<std::vector<int32_t>> ReadStepOrder(const fs::path& path, int64_t num_rows) {
  const Json json = ParseJson(ReadTextFile(path), path.string());
  const char* hint = "expected a list of steps, each a list of row numbers: [[0, 8], [3, 1]]";
  if (!json.is_array() || json.empty()) throw ModelError(path.string() + ": no list", hint);
  std::vector<std::vector<int32_t>> steps;
  for (const Json& step : json) {
    if (!step.is_array() || step.empty()) {
      throw ModelError(fmt::format("{}: step {} is no list", path.string(), steps.size()), hint);
    }
    std::vector<int32_t> rows;
    for (const Json& row : step) {
      if (!row.is_number_integer() || row.get<int64_t>() < 0 || row.get<int64_t>() >= num_rows) {
        throw UsageError(fmt::format("{}: step {} names row {}, there are {}", path.string(),
                                     steps.size(), row.dump(), num_rows),
                         hint);
      }
      rows.push_back(row.get<int32_t>());
    }
    steps.push_back(std::move(rows));
  }
  return steps;
}

TrainBatch MakeBatch(const std::vector<TrainRow>& rows, std::span<const int32_t> numbers) {
  TrainBatch batch;
  bool masked = false;
  for (const int32_t number : numbers) {
    masked = masked || !rows[static_cast<size_t>(number)].mask.empty();
  }
  for (const int32_t number : numbers) {
    const TrainRow& row = rows[static_cast<size_t>(number)];
    batch.lengths.push_back(static_cast<int64_t>(row.ids.size()));
    batch.ids.insert(batch.ids.end(), row.ids.begin(), row.ids.end());
    for (size_t t = 0; t < row.ids.size(); ++t) {
      const bool last = t + 1 == row.ids.size();
      const float weight = last ? 0 : row.weights.empty() ? 1 : row.weights[t + 1];
      batch.targets.push_back(weight > 0 ? row.ids[t + 1] : -1);
      batch.weights.push_back(weight);
    }
    if (!masked) continue;
    if (row.mask.empty()) {
      batch.key_mask.insert(batch.key_mask.end(), row.ids.size(), 1);
    } else {
      batch.key_mask.insert(batch.key_mask.end(), row.mask.begin(), row.mask.end());
    }
  }
  return batch;
}

}  // namespace winnow
