// The two ways to multiply a block of text tokens with a block of SMILES tokens: what a panel of either side looks like,
// the product of two, and where the tokens' lengths come in.
//
// A token without a direction (inverse norm 0) or one that is not finite (inverse norm NaN) is packed as zeros: every
// index stays in range, and the scores of what is not finite are overwritten with NaN.
#pragma once

#include "convert.h"
#include "tiles.h"
#ifdef ATOMAS_AMX
#include "amx.h"
#endif

namespace atomas {
namespace ATOMAS_ISA {

// Unit tokens in float32, products in registers.
struct SinglePanels {
  template <int tokens>
  struct Panel {
    using Element = float;
    static constexpr int64_t kTokens = tokens;
    static int64_t size(int64_t width) { return tokens * width; }
    // `rows` are the tokens from `first` on, in float32.
    static void pack(const Matrix&, int64_t, const float* rows, const float* inverse_norm, int64_t count, int64_t width,
                     float* out) {
      float scale[tokens];
      for (int64_t i = 0; i < count; ++i) scale[i] = inverse_norm[i] == inverse_norm[i] ? inverse_norm[i] : 0.0f;
      atomas::ATOMAS_ISA::pack(rows, scale, count, width, tokens, out);
    }
  };
  using Left = Panel<kTileRows>;
  using Right = Panel<kTileColumns>;

  void product(const float* left, const float* right, int64_t width, float* out, int64_t stride) {
    tile<Product>(left, right, width, out, stride);
  }
  static void scale(float*, int64_t, const float*, int64_t, const float*, int64_t) {}
};

#ifdef ATOMAS_AMX
// Tokens as they are, in bfloat16: their products are exact and summed in float32, so nothing is lost against the form
// above. 32 tokens of either side are a panel: for every 32 columns two tiles of 16 tokens. On the right neighbouring
// columns of one token stand together (VNNI), [16 pairs][16 tokens][2].
struct BfloatTiles {
  static constexpr int64_t kTile = kTileTokens * kTileDepth;

  template <bool pairs>
  struct Panel {
    using Element = uint16_t;
    static constexpr int64_t kTokens = 2 * kTileTokens;
    static int64_t size(int64_t width) { return kTokens * round_up(width, kTileDepth); }
    static void pack(const Matrix& matrix, int64_t first, const float*, const float* inverse_norm, int64_t count,
                     int64_t width, uint16_t* out) {
      std::memset(out, 0, static_cast<size_t>(size(width)) * sizeof(uint16_t));
      for (int64_t i = 0; i < count; ++i) {
        if (!(inverse_norm[i] > 0)) continue;
        const uint16_t* from = static_cast<const uint16_t*>(matrix.data) + (first + i) * matrix.stride;
        uint16_t* tile = out + i / kTileTokens * kTile;
        for (int64_t d = 0; d < width; d += kTileDepth, tile += 2 * kTile) {
          uint16_t columns[kTileDepth] = {};
          std::memcpy(columns, from + d, static_cast<size_t>(smaller(kTileDepth, width - d)) * sizeof(uint16_t));
          if (pairs) {
            uint16_t* to = tile + i % kTileTokens * 2;
            for (int64_t k = 0; k < kTileDepth; k += 2) std::memcpy(to + k * kTileTokens, columns + k, 4);
          } else {
            std::memcpy(tile + i % kTileTokens * kTileDepth, columns, sizeof columns);
          }
        }
      }
    }
  };
  using Left = Panel<false>;
  using Right = Panel<true>;

  void product(const uint16_t* left, const uint16_t* right, int64_t width, float* out, int64_t stride) {
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
    for (int64_t d = 0; d < width; d += kTileDepth, left += 2 * kTile, right += 2 * kTile) {
      tiles.load<4>(left);
      tiles.load<5>(left + kTile);
      tiles.load<6>(right);
      tiles.load<7>(right + kTile);
      tiles.multiply_add<0, 4, 6>();
      tiles.multiply_add<1, 4, 7>();
      tiles.multiply_add<2, 5, 6>();
      tiles.multiply_add<3, 5, 7>();
    }
    tiles.store<0>(out, stride);
    tiles.store<1>(out + kTileTokens, stride);
    tiles.store<2>(out + kTileTokens * stride, stride);
    tiles.store<3>(out + kTileTokens * stride + kTileTokens, stride);
  }

  static void scale(float* out, int64_t stride, const float* left, int64_t rows, const float* right, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
      float* row = out + i * stride;
      for (int64_t j = 0; j < columns; ++j) row[j] = row[j] * left[i] * right[j];
    }
  }

  Tiles tiles;
};
#endif

}  // namespace ATOMAS_ISA
}  // namespace atomas
