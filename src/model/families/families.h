// The list of family data files; see model/family.h.
#pragma once

#include "model/family.h"  // Family

namespace winnow::families {

extern const Family kMixtral;
extern const Family kQwen2Moe;
extern const Family kQwen3Moe;
extern const Family kOlmoe;
extern const Family kDeepseek;

}  // namespace winnow::families
