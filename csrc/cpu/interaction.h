// What the two directions of the token interaction share.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace atomas {
namespace ATOMAS_ISA {

// 1 / ||x||; 0 for a token shorter than 1e-12, whose direction means nothing; NaN for one whose length is not finite.
inline float inverse_norm(const float* x, int64_t width) {
  Floats sums = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) sums += load(x + d) * load(x + d);
  float sum = lane_sum(sums);
  for (; d < width; ++d) sum += x[d] * x[d];
  const float norm = __builtin_sqrtf(sum);
  if (!(norm < kInfinity)) return __builtin_nanf("");
  return norm < 1e-12f ? 0.0f : 1 / norm;
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
