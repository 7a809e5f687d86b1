// Which instruction sets the kernels were compiled for and which one runs. Chosen once at start.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace winnow {

// "scalar", "avx2", "avx512", "avx512_bf16": those this CPU can run, best last.
std::vector<std::string> SupportedIsas();
// The one the kernels use now.
std::string ActiveIsa();
// Pins the kernels to `name`; UsageError if the CPU cannot run it. Call before any kernel.
// Results are the same bytes for any thread count per ISA, not across ISAs.
void SelectIsa(std::string_view name);

}  // namespace winnow
