#include "serve/api_error.h"

#include <fmt/format.h>

#include <new>

namespace winnow {
namespace {

const char* TypeOf(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    case 500:
      return "server_error";
    case 503:
      return "unavailable_error";
    default:
      return "invalid_request_error";
  }
}

}  // namespace

ApiError::ApiError(int status, std::string code, const std::string& message, std::string param)
    : Error(status < 500 ? ExitCode::kUsage : ExitCode::kRuntime, message, {}),
      status_(status),
      code_(std::move(code)),
      param_(std::move(param)) {}

ApiError InvalidField(const std::string& field, const std::string& expected) {
  return ApiError(400, "invalid_value", fmt::format("{}: expected {}", field, expected), field);
}

ApiError UnsupportedField(const std::string& field, const std::string& why) {
  return ApiError(400, "unsupported_parameter", fmt::format("{}: {}", field, why), field);
}

OrderedJson ErrorJson(const ApiError& error) {
  OrderedJson param = nullptr;
  if (!error.param().empty()) param = error.param();
  return {{"error",
           {{"message", error.what()},
            {"type", TypeOf(error.status())},
            {"param", param},
            {"code", error.code()}}}};
}

ApiError AsApiError(const std::exception& error) {
  if (const auto* api = dynamic_cast<const ApiError*>(&error)) return *api;
  if (const auto* usage = dynamic_cast<const UsageError*>(&error)) {
    return ApiError(400, "invalid_request", usage->what());
  }
  if (dynamic_cast<const InterruptedError*>(&error) != nullptr) {
    return ApiError(503, "stopping", "the server is stopping");
  }
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) {
    return ApiError(500, "out_of_memory", "the server is out of memory");
  }
  return ApiError(500, "internal_error", error.what());
}

}  // namespace winnow
