#include "base/units.h"

#include <fmt/format.h>

#include <array>
#include <cctype>
#include <charconv>
#include <cmath>

#include "base/error.h"

namespace winnow {

uint64_t ParseBytes(std::string_view text, std::string_view flag) {
  double value = 0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
  std::string suffix(end, text.data() + text.size());
  for (char& c : suffix) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  double unit = -1;
  if (suffix.empty() || suffix == "B") unit = 1;
  constexpr std::string_view kLetters = "KMGT";
  for (size_t i = 0; i < kLetters.size(); ++i) {
    const std::string letter(1, kLetters[i]);
    if (suffix == letter || suffix == letter + "B" || suffix == letter + "IB") {
      unit = std::exp2(10.0 * static_cast<double>(i + 1));
    }
  }
  const double bytes = value * unit;
  if (code != std::errc() || unit < 0 || !(bytes >= 0) || bytes > 0x1p60) {
    throw UsageError(fmt::format("{}: \"{}\" is not a size", flag, text),
                     "write a number with K, M, G or T (powers of 1024), for example 4G");
  }
  return static_cast<uint64_t>(bytes);
}

std::string FormatBytes(uint64_t bytes) {
  constexpr std::array kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1023.5 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  if (unit == 0) return fmt::format("{} B", bytes);
  return fmt::format(fmt::runtime(value < 100 ? "{:.1f} {}" : "{:.0f} {}"), value, kUnits[unit]);
}

std::string FormatSeconds(double seconds) {
  if (seconds < 10) return fmt::format("{:.1f} s", seconds);
  if (seconds < 120) return fmt::format("{:.0f} s", seconds);
  const auto minutes = static_cast<int64_t>(seconds / 60 + 0.5);
  if (minutes < 60) return fmt::format("{} min", minutes);
  return fmt::format("{} h {:02d} min", minutes / 60, minutes % 60);
}

std::string FormatCount(uint64_t value) {
  std::string digits = std::to_string(value);
  for (int64_t i = static_cast<int64_t>(digits.size()) - 3; i > 0; i -= 3) {
    digits.insert(static_cast<size_t>(i), ",");
  }
  return digits;
}

}  // namespace winnow
