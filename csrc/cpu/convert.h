// Rows of half precision as float32: exact, a few rows at a time.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace atomas {
namespace ATOMAS_ISA {

inline Floats from_bits(Words bits) {
  Floats values;
  std::memcpy(&values, &bits, sizeof values);
  return values;
}

inline Floats widened_bfloat(Words bits) { return from_bits(bits << 16); }

// Exponent and fraction move to their places, and 2^112 makes up for the other bias (and normalises what is denormal).
inline Floats widened_half(Words bits) {
  const Words magnitude = bits & 0x7fff;
  const Floats finite = from_bits(magnitude << 13) * splat(0x1p112f);
  Words words;
  std::memcpy(&words, &finite, sizeof words);
  words |= magnitude >= 0x7c00 ? Words{} + 0x7f800000 : Words{};
  return from_bits(words | (bits & 0x8000) << 16);
}

template <Floats widened(Words)>
inline void widen(const uint16_t* from, int64_t count, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) {
    Halves halves;
    std::memcpy(&halves, from + d, sizeof halves);
    store(to + d, widened(__builtin_convertvector(halves, Words)));
  }
  for (; d < count; ++d) to[d] = widened(Words{} + from[d])[0];
}

// The matrix without its first rows.
inline Matrix rows_from(const Matrix& matrix, int64_t row) {
  const int64_t bytes = row * matrix.stride * (matrix.type == Float::single ? 4 : 2);
  return {static_cast<const char*>(matrix.data) + bytes, matrix.type, matrix.rows - row, matrix.width, matrix.stride};
}

// Copies one row to `to`.
inline void copy_row(const Matrix& matrix, int64_t row, float* to) {
  const int64_t first = row * matrix.stride;
  switch (matrix.type) {
    case Float::single:
      std::memcpy(to, static_cast<const float*>(matrix.data) + first, static_cast<size_t>(matrix.width) * sizeof(float));
      break;
    case Float::bfloat:
      widen<widened_bfloat>(static_cast<const uint16_t*>(matrix.data) + first, matrix.width, to);
      break;
    case Float::half:
      widen<widened_half>(static_cast<const uint16_t*>(matrix.data) + first, matrix.width, to);
      break;
  }
}

// `count` contiguous rows as float32: where they are if that is what they hold, else copied to `scratch`.
inline const float* rows_of(const Matrix& matrix, int64_t row, int64_t count, float* scratch) {
  if (matrix.type == Float::single) return static_cast<const float*>(matrix.data) + row * matrix.stride;
  for (int64_t i = 0; i < count; ++i) copy_row(matrix, row + i, scratch + i * matrix.width);
  return scratch;
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
