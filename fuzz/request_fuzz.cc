// A body of the completion endpoints as bytes: either refused with status 400, or a request whose
// numbers can be relied on.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "serve/request.h"

namespace {

constexpr int64_t kVocabulary = 1000;

void Check(const winnow::GenerationSettings& settings) {
  if (!(settings.sampling.temperature >= 0) || !(settings.sampling.top_p >= 0)) std::abort();
  if (settings.sampling.top_p > 1 || settings.sampling.top_k < 0) std::abort();
  if (settings.choices < 1 || settings.choices > winnow::kMaxSequencesPerRequest) std::abort();
  if (settings.max_tokens && *settings.max_tokens < 0) std::abort();
  if (settings.top_logprobs && (*settings.top_logprobs < 0 || *settings.top_logprobs > 20)) {
    std::abort();
  }
  for (const std::string& stop : settings.stop) {
    if (stop.empty()) std::abort();
  }
  for (const auto& [id, bias] : settings.rules.logit_bias) {
    if (id < 0 || id >= kVocabulary || !std::isfinite(bias)) std::abort();
  }
}

template <typename Parse>
void Try(Parse parse) {
  try {
    parse();
  } catch (const winnow::ApiError& error) {
    if (error.status() != 400) std::abort();
    winnow::ErrorJson(error).dump(-1, ' ', true, winnow::OrderedJson::error_handler_t::replace);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace winnow;
  const std::string_view body(reinterpret_cast<const char*>(data), size);
  OrderedJson json;
  try {
    json = ParseBody(body);
  } catch (const ApiError&) {
    return 0;
  }
  Try([&] {
    const CompletionRequest request = ParseCompletionRequest(json, kVocabulary);
    Check(request.settings);
    for (const Prompt& prompt : request.prompts) {
      for (const int32_t id : prompt.ids) {
        if (id < 0 || id >= kVocabulary) std::abort();
      }
    }
  });
  Try([&] {
    const ChatRequest request = ParseChatRequest(json, kVocabulary);
    Check(request.settings);
    for (const OrderedJson& message : request.messages) {
      if (!message.at("role").is_string()) std::abort();
      if (!message.at("content").is_string() && !message.at("content").is_null()) std::abort();
    }
  });
  Try([&] { ParseTokenizeRequest(json); });
  Try([&] { ParseDetokenizeRequest(json, kVocabulary); });
  return 0;
}
