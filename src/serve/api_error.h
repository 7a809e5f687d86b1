// What a client is told when its request cannot be answered: an HTTP status and the error object of
// OpenAI's interface. Thrown anywhere between the request's bytes and the scheduler; only the
// server turns it into a response.
#pragma once

#include <string>

#include "base/error.h"  // Error
#include "base/json.h"   // OrderedJson

namespace winnow {

class ApiError : public Error {
 public:
  ApiError(int status, std::string code, const std::string& message, std::string param = {});
  int status() const { return status_; }
  const std::string& code() const { return code_; }
  // The request's field that is wrong, empty if it is none in particular.
  const std::string& param() const { return param_; }
  // Seconds after which trying again makes sense (header Retry-After), 0 if it does not.
  int retry_after_seconds() const { return status_ == 429 || status_ == 503 ? 1 : 0; }

 private:
  int status_;
  std::string code_, param_;
};

// 400, naming the field.
ApiError InvalidField(const std::string& field, const std::string& expected);
// 400: the field is known and not supported.
ApiError UnsupportedField(const std::string& field, const std::string& why);

// {"error": {"message", "type", "param", "code"}}.
OrderedJson ErrorJson(const ApiError& error);
// The same for what was not foreseen: errors of the request as 400, the rest as 500.
ApiError AsApiError(const std::exception& error);

}  // namespace winnow
