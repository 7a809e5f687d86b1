// NFC, NFD, NFKC and NFKD as the reference library computes them: with the tables of an older
// Unicode version, whose unknown characters neither decompose, combine nor reorder.
#pragma once

#include <string>
#include <string_view>

namespace winnow::tok {

struct NormalizationForm {
  bool compose;
  bool compatibility;
};

// `text` is valid UTF-8. Linear in its length.
std::string NormalizeUnicode(std::string_view text, NormalizationForm form);

// Lower case of each character by itself (no final sigma), as Rust's char::to_lowercase.
std::string LowercaseUnicode(std::string_view text);

}  // namespace winnow::tok
