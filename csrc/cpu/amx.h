// The tile registers of AMX, as far as a product of bfloat16 needs them; with ATOMAS_AMX_EMULATED the same in plain
// code, so that what is built on them can run, and be tested, on any machine.
#pragma once

#include "vector.h"

namespace atomas {
namespace ATOMAS_ISA {

// A tile register: 16 rows of 64 bytes, that is 16 tokens by 32 columns of bfloat16 or 16 by 16 of float32.
constexpr int64_t kTileTokens = 16;
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileRowBytes = 64;

#ifndef ATOMAS_AMX_EMULATED

// Holds the thread's eight tile registers from construction to destruction.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    static_assert(sizeof shapes == 64, "the layout that ldtilecfg reads");
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = kTileRowBytes;
      shapes.rows[i] = kTileTokens;
    }
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  // 16 contiguous rows.
  template <int tile>
  void load(const uint16_t* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(kTileRowBytes), "i"(tile) : "memory");
  }
  // sum[i][j] += sum over pairs k of left[i][2 k] * right[k][2 j] + left[i][2 k + 1] * right[k][2 j + 1].
  template <int sum, int left, int right>
  void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right));
  }
  template <int tile>
  void store(float* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
                 :
                 : "r"(to), "r"(stride * int64_t{sizeof(float)}), "i"(tile)
                 : "memory");
  }
};

#else

class Tiles {
 public:
  template <int tile>
  void zero() {
    std::memset(bytes_[tile], 0, sizeof bytes_[tile]);
  }
  template <int tile>
  void load(const uint16_t* from) {
    std::memcpy(bytes_[tile], from, sizeof bytes_[tile]);
  }
  // Even and odd columns are summed apart, then both are added, as the processor does it.
  template <int sum, int left, int right>
  void multiply_add() {
    for (int i = 0; i < kTileTokens; ++i) {
      for (int j = 0; j < kTileTokens; ++j) {
        float even = 0, odd = 0;
        for (int k = 0; k < kTileTokens; ++k) {
          even += bfloat(left, i, 2 * k) * bfloat(right, k, 2 * j);
          odd += bfloat(left, i, 2 * k + 1) * bfloat(right, k, 2 * j + 1);
        }
        float value;
        std::memcpy(&value, bytes_[sum] + i * kTileRowBytes + j * 4, sizeof value);
        value += even + odd;
        std::memcpy(bytes_[sum] + i * kTileRowBytes + j * 4, &value, sizeof value);
      }
    }
  }
  template <int tile>
  void store(float* to, int64_t stride) {
    for (int i = 0; i < kTileTokens; ++i) std::memcpy(to + i * stride, bytes_[tile] + i * kTileRowBytes, kTileRowBytes);
  }

 private:
  float bfloat(int tile, int row, int column) const {
    uint16_t half;
    std::memcpy(&half, bytes_[tile] + row * kTileRowBytes + column * 2, sizeof half);
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  uint8_t bytes_[8][kTileTokens * kTileRowBytes];
};

#endif

}  // namespace ATOMAS_ISA
}  // namespace atomas
