// Dropout of any values in one pass; its gradient is the same of the gradient, with the same seed.

#include "dropout.h"

#include "kernels.h"

namespace atomas {
namespace ATOMAS_ISA {

void dropout(const DropoutProblem& p) {
  constexpr int64_t kRow = 1 << 16;
  for_each_task((p.count + kRow - 1) / kRow, p.threads, [&](int64_t, int64_t row) {
    const Dropout drop(p.seed, static_cast<uint64_t>(row), p.threshold);
    const int64_t count = smaller(kRow, p.count - row * kRow);
    const float* from = p.input + row * kRow;
    float* to = p.output + row * kRow;
    const Floats scale = splat(p.scale);
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) store(to + j, drop(load(from + j) * scale, j));
    if (j == count) return;
    Floats rest{};
    std::memcpy(&rest, from + j, static_cast<size_t>(count - j) * sizeof(float));
    rest = drop(rest * scale, j);
    std::memcpy(to + j, &rest, static_cast<size_t>(count - j) * sizeof(float));
  });
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
