// What the two directions of the token interaction share.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace atomas {
namespace ATOMAS_ISA {

// 1 / ||x||; 0 for a token shorter than 1e-12, whose direction means nothing; NaN for one that is not finite.
inline float inverse_norm(const float* x, int64_t width) {
  double sum = 0;
  for (int64_t d = 0; d < width; ++d) sum += static_cast<double>(x[d]) * x[d];
  const double norm = __builtin_sqrt(sum);
  if (!(norm < static_cast<double>(kInfinity))) return __builtin_nanf("");
  return norm < 1e-12 ? 0.0f : static_cast<float>(1 / norm);
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
