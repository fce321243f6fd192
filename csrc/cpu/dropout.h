// Which values are dropped: a function of a seed, a row and a column, so that no mask is kept.
#pragma once

#include "vector.h"

namespace atomas {
namespace ATOMAS_ISA {

class Dropout {
 public:
  // A value is dropped with probability threshold / 2^32.
  Dropout(uint64_t seed, uint64_t row, uint32_t threshold) : threshold_(threshold) {
    uint64_t x = seed + (row + 1) * 0x9e3779b97f4a7c15u;  // splitmix64
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    first_ = static_cast<uint32_t>(x);
    second_ = static_cast<uint32_t>(x >> 32);
  }

  // `value` of the columns j, j + 1, ..., or 0.
  Floats operator()(Floats value, int64_t j) const {
    const Ints lanes = lane_numbers() + static_cast<int32_t>(j);
    Words x;
    std::memcpy(&x, &lanes, sizeof x);
    x = x * 0x9e3779b9u + first_;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15 ^ second_) * 0x846ca68bu;
    x ^= x >> 16;
    return x >= Words{} + threshold_ ? value : Floats{};
  }

 private:
  uint32_t threshold_, first_, second_;
};

}  // namespace ATOMAS_ISA
}  // namespace atomas
