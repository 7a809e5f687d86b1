// Sizes as people write and read them: K, M, G, T are powers of 1024.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace winnow {

// "4G", "1.5GiB", "512M", "4096" (bytes). UsageError names `flag` if it is none of these.
uint64_t ParseBytes(std::string_view text, std::string_view flag);
// 1536 -> "1.5 KiB".
std::string FormatBytes(uint64_t bytes);
// 3725.2 -> "1 h 02 min"; 0.42 -> "0.4 s".
std::string FormatSeconds(double seconds);
// 1234567 -> "1,234,567".
std::string FormatCount(uint64_t value);

}  // namespace winnow
