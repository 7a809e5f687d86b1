// Attention of one new token: its query heads that share a head of keys and values, against all
// keys in a cache. The sums of an output depend on the number of keys and their values alone.
#pragma once

#include <cstdint>

namespace winnow {

// out [queries, head_dim] = softmax(scale q . k) v for q [queries, head_dim], keys and values
// [num_keys, head_dim], all contiguous. scores [num_keys] is scratch. num_keys >= 1.
void AttendOne(const float* q, int64_t queries, const float* keys, const float* values,
               int64_t num_keys, int64_t head_dim, float scale, float* scores, float* out);

}  // namespace winnow
