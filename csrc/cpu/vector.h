// Vectors and memory of one instruction set. Included by sources that are compiled once per set, with ATOMAS_ISA naming
// the namespace and the compiler's own flags (-mavx2, ...) giving the width.
//
// Such a source must not instantiate a template of the standard library: the linker keeps one copy of each, and it
// could be the one that needs AVX-512.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "parallel.h"

namespace atomas {
namespace ATOMAS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

constexpr float kInfinity = __builtin_inff();

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline void store(int32_t* to, Ints value) { std::memcpy(to, &value, sizeof value); }

inline Floats splat(float x) { return x - Floats{}; }

inline Ints splat(int32_t x) { return x - Ints{}; }

inline Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

inline float lane_sum(Floats value) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}

// Halving instead of a chain of comparisons: no branches, and three steps for eight lanes.
inline float lane_maximum(Floats value) {
#pragma GCC unroll 8
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) value[i] = value[i] > value[i + half] ? value[i] : value[i + half];
  }
  return value[0];
}

inline int32_t lane_minimum(Ints value) {
#pragma GCC unroll 8
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) value[i] = value[i] < value[i + half] ? value[i] : value[i + half];
  }
  return value[0];
}

// e^x for x <= 0, to two units in the last place; 0 where that is denormal, NaN for NaN.
inline Floats exponential(Floats x) {
  constexpr float kLeast = -87.33f;
  const Ints vanishes = x < splat(kLeast);
  x = vanishes ? splat(kLeast) : x;
  // x = n log 2 + r with |r| <= log(2) / 2. Adding 1.5 * 2^23 leaves the integer n in the last bits of the sum.
  const Floats shifted = x * splat(1.44269504f) + splat(12582912.0f);
  const Floats n = shifted - splat(12582912.0f);
  const Floats r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  // Taylor's series: what is left out is below 2^-27.
  Floats series = splat(1.0f / 5040);
  series = series * r + splat(1.0f / 720);
  series = series * r + splat(1.0f / 120);
  series = series * r + splat(1.0f / 24);
  series = series * r + splat(1.0f / 6);
  series = series * r + splat(0.5f);
  series = series * r + splat(1.0f);
  series = series * r + splat(1.0f);
  Words power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &power, sizeof scale);
  return vanishes ? Floats{} : series * scale;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Uninitialised memory on cache lines, with one spare vector behind the end for whole-vector reads.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(std::aligned_alloc(64, round_up((size + kLanes) * int64_t{sizeof(T)}, 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

template <class Body>
void for_each_task(int64_t count, int threads, const Body& body) {
  run_tasks(
      count, threads,
      [](const void* context, int64_t worker, int64_t index) { (*static_cast<const Body*>(context))(worker, index); },
      &body);
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
