// The register-blocked product that the similarity and the distance matrices share.
//
// Tokens are packed in panels, [width][tokens of the panel], so that one step of the inner loop reads a few neighbouring
// floats of either side. A tile is summed over the whole width in registers: every entry is added up in the same order
// wherever it lies, so equal tokens give bitwise equal entries and ties are exact.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace atomas {
namespace ATOMAS_ISA {

// As many accumulators as the registers hold beside one row of the right side and a broadcast of the left.
constexpr int kTileVectors = 2;
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
constexpr int kTileColumns = kTileVectors * kLanes;

struct Product {
  static Floats add(Floats sum, Floats a, Floats b) { return sum + a * b; }
};

struct SquaredDifference {
  static Floats add(Floats sum, Floats a, Floats b) {
    const Floats difference = a - b;
    return sum + difference * difference;
  }
};

// Where the numbers of a tile's side are: from one token to the next, and from one step of the sum to the next.
struct Steps {
  int64_t token, depth;
};

// What a product has to do beside every step of its sum: nothing, or
struct Nothing {
  ATOMAS_INLINE void operator()() const {}
};

// fetch a line of memory that is wanted next into the second-level cache: a product has the time for it.
struct Prefetch {
  const char* next;
  const char* end;

  ATOMAS_INLINE void operator()() {
    if (next >= end) return;
    __builtin_prefetch(next, 0, 2);
    next += 64;
  }
};

// out[i * stride + j] (+)= sum over d < depth of Step(left(i, d), right(d, j)) for one tile. The columns of the right
// side are neighbours.
template <class Step, int rows, bool add, int vectors = kTileVectors, class Beside = const Nothing>
ATOMAS_INLINE void tile(const float* left, Steps left_steps, const float* right, int64_t right_step, int64_t depth,
                        float* out, int64_t stride, Beside& beside = Nothing{}) {
  Floats sum[rows][vectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Floats b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) b[v] = load(right + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Floats a = splat(left[i * left_steps.token]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[i][v] = Step::add(sum[i][v], a, b[v]);
    }
    beside();
    left += left_steps.depth;
    right += right_step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* to = out + i * stride + v * kLanes;
      store(to, add ? load(to) + sum[i][v] : sum[i][v]);
    }
  }
}

// The tile of two packed panels.
template <class Step>
inline void tile(const float* left, const float* right, int64_t width, float* out, int64_t stride) {
  tile<Step, kTileRows, false>(left, {1, kTileRows}, right, kTileColumns, width, out, stride);
}

// Packs `count` rows, scaled by scale[row] (null: 1), into panels of `panel` rows; missing rows are zero. By chunks of
// columns: what a chunk is written to, a line for each column, stays in the first-level cache.
inline void pack(const float* rows, const float* scale, int64_t count, int64_t width, int panel, float* out) {
  constexpr int64_t kChunk = 64;
  for (int64_t first = 0; first < count; first += panel) {
    for (int64_t begin = 0; begin < width; begin += kChunk) {
      const int64_t end = smaller(begin + kChunk, width);
      for (int i = 0; i < panel; ++i) {
        const int64_t row = first + i;
        const float factor = row >= count ? 0.0f : scale == nullptr ? 1.0f : scale[row];
        const float* from = rows + smaller(row, count - 1) * width;
        // A factor of zero must clear what is not finite too.
        if (factor == 0.0f) {
          for (int64_t d = begin; d < end; ++d) out[d * panel + i] = 0.0f;
        } else {
          for (int64_t d = begin; d < end; ++d) out[d * panel + i] = from[d] * factor;
        }
      }
    }
    out += panel * width;
  }
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
