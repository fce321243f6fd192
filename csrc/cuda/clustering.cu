// Density-peak clustering (method.md 3.1, step 2) of sequences of up to 23104 tokens, whose tiles a grid can count.
//
// Two kernels: tiles of the squared distances, shared out over the whole device, then one block per sequence that
// counts ranks. Nothing is sorted and nothing is added up in an order that could change, so every run gives the same
// labels. Memory: one float per pair of tokens of the same sequence.

#include "common.h"

namespace atomas {
namespace {

constexpr int kTile = 64;               // tokens on either side of a tile of distances
constexpr int kDepth = 16;              // features that are staged at a time
constexpr int kTileThreads = 256;       // 16 x 16, each with 4 x 4 distances
constexpr int kPitch = kTile + 4;       // keeps rows of four aligned and spreads them over the banks
constexpr int kSequenceThreads = 512;   // at most
constexpr int kNearestAtATime = 4;

struct Batch {
  const int64_t* lengths;  // [count]
  const int64_t* ends;     // [2, count], running sums of the lengths and of their squares
  int64_t count;
  int64_t width;
};

struct Sequence {
  __device__ Sequence(const Batch& batch, int64_t index)
      : size(static_cast<int>(batch.lengths[index])),
        begin(batch.ends[index] - size),
        matrix(batch.ends[batch.count + index] - static_cast<int64_t>(size) * size) {}

  int size;
  int64_t begin;   // its first token
  int64_t matrix;  // its first distance
};

using Stage = float[kDepth][kPitch];

// Features [depth, depth + kDepth) of tokens [first, first + kTile), zero outside. Each thread holds four values.
template <typename Token>
__device__ void fetch(const Token* tokens, int size, int64_t width, int first, int64_t depth, float (&held)[4]) {
  const int64_t column = depth + threadIdx.x % kDepth;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const int row = first + threadIdx.x / kDepth + part * (kTileThreads / kDepth);
    held[part] = row < size && column < width ? to_float(tokens[row * width + column]) : 0.0f;
  }
}

__device__ void put(const float (&held)[4], Stage& stage) {
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    stage[threadIdx.x % kDepth][threadIdx.x / kDepth + part * (kTileThreads / kDepth)] = held[part];
  }
}

// Adds the staged features' share of this thread's 4 x 4 distances. Differences, not the Gram form: in single precision
// that loses the small distances, and with them the exact ties of equal tokens. Features are summed in groups, which
// keeps the rounding error that of a short sum.
__device__ void accumulate(const Stage& left, const Stage& right, float (&square)[4][4]) {
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  float group[4][4] = {};
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const float4 l = *reinterpret_cast<const float4*>(&left[k][row]);
    const float4 r = *reinterpret_cast<const float4*>(&right[k][column]);
    const float x[4] = {l.x, l.y, l.z, l.w}, y[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const float difference = x[a] - y[b];
        group[a][b] = fmaf(difference, difference, group[a][b]);
      }
    }
  }
#pragma unroll
  for (int a = 0; a < 4; ++a) {
#pragma unroll
    for (int b = 0; b < 4; ++b) square[a][b] += group[a][b];
  }
}

// One tile on or above the diagonal and its mirror image: squares[i, j] = ||x_i - x_j||^2, NaN as infinity.
template <typename Token>
__global__ void __launch_bounds__(kTileThreads) square_distances(Batch batch, const Token* tokens, float* squares) {
  alignas(16) __shared__ Stage left[2], right[2];
  __shared__ float tile[kTile][kTile + 1];

  const Sequence sequence(batch, blockIdx.x);
  const int size = sequence.size, rows = (size + kTile - 1) / kTile;
  int row = 0, column = static_cast<int>(blockIdx.y);
  while (row < rows && column >= rows - row) column -= rows - row++;
  if (row == rows) return;
  const int top = row * kTile, side = (row + column) * kTile;

  const Token* own = tokens + sequence.begin * batch.width;
  float above[4], beside[4], square[4][4] = {};
  fetch(own, size, batch.width, top, 0, above);
  fetch(own, size, batch.width, side, 0, beside);
  int buffer = 0;
  for (int64_t depth = 0; depth < batch.width; depth += kDepth) {
    // Of two buffers the one written here was last read before the previous barrier.
    put(above, left[buffer]);
    put(beside, right[buffer]);
    __syncthreads();
    fetch(own, size, batch.width, top, depth + kDepth, above);
    fetch(own, size, batch.width, side, depth + kDepth, beside);
    accumulate(left[buffer], right[buffer], square);
    buffer ^= 1;
  }

#pragma unroll
  for (int a = 0; a < 4; ++a) {
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const float value = square[a][b];
      tile[threadIdx.x / 16 * 4 + a][threadIdx.x % 16 * 4 + b] = value == value ? value : INFINITY;
    }
  }
  __syncthreads();
  float* matrix = squares + sequence.matrix;
  for (int place = threadIdx.x; place < kTile * kTile; place += kTileThreads) {
    const int slow = place / kTile, fast = place % kTile;
    if (top + slow < size && side + fast < size) {
      matrix[static_cast<int64_t>(top + slow) * size + side + fast] = tile[slow][fast];
    }
    if (column > 0 && side + slow < size && top + fast < size) {
      matrix[static_cast<int64_t>(side + slow) * size + top + fast] = tile[fast][slow];
    }
  }
}

// Results of the tokens of one sequence, in the order in which they are found.
struct Findings {
  float* spread;      // mean squared distance of the nearest tokens; the density is exp(-spread)
  float* farthest;    // largest squared distance
  float* importance;  // density times separation
  int* centre;        // token of each cluster
};

// Sum of the `neighbours` smallest of `size` values, which stand `size` apart. They are found four at a time in order
// of value and place, so that what was taken in earlier rounds is told by the last one taken.
__device__ float sum_of_nearest(const float* column, int size, int neighbours) {
  float sum = 0.0f, last = -1.0f;
  int last_place = -1;
  for (int left = neighbours; left > 0; left -= kNearestAtATime) {
    float nearest[kNearestAtATime] = {INFINITY, INFINITY, INFINITY, INFINITY};
    int place[kNearestAtATime] = {size, size, size, size};
    for (int j = 0; j < size; ++j) {
      float value = column[static_cast<int64_t>(j) * size];
      if (value < last || (value == last && j <= last_place)) continue;
      int at = j;
#pragma unroll
      for (int m = 0; m < kNearestAtATime; ++m) {
        if (value < nearest[m] || (value == nearest[m] && at < place[m])) {
          const float held = nearest[m];
          const int held_at = place[m];
          nearest[m] = value;
          place[m] = at;
          value = held;
          at = held_at;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kNearestAtATime; ++m) {
      if (m < left) sum += nearest[m];
    }
    last = nearest[kNearestAtATime - 1];
    last_place = place[kNearestAtATime - 1];
  }
  return sum;
}

// Density times separation. A token is denser by its smaller spread, then by its lower index; the separation is the
// distance to the nearest denser token, for the densest the largest distance of the sequence.
__device__ float importance_of(int i, const float* column, int size, float width, const Findings& found) {
  const float own = found.spread[i];
  float nearest = INFINITY, largest = 0.0f;
  bool densest = true;
  for (int j = 0; j < size; ++j) {
    const bool denser = j < i ? found.spread[j] <= own : found.spread[j] < own;
    const float square = column[static_cast<int64_t>(j) * size];
    densest = densest && !denser;
    nearest = denser ? fminf(nearest, square) : nearest;
    largest = fmaxf(largest, found.farthest[j]);
  }
  const float value = expf(-own) * sqrtf((densest ? largest : nearest) / width);
  return value == value ? value : 0.0f;
}

// Number of tokens of larger importance, equal ones by index.
__device__ int rank_of(int i, int size, const float* importance) {
  const float own = importance[i];
  int rank = 0;
  for (int j = 0; j < size; ++j) rank += j < i ? importance[j] >= own : importance[j] > own;
  return rank;
}

__device__ int nearest_centre(const float* column, int size, int clusters, const int* centre) {
  float best = INFINITY;
  int label = 0;
  for (int c = 0; c < clusters; ++c) {
    const float square = column[static_cast<int64_t>(centre[c]) * size];
    if (square < best) {
      best = square;
      label = c;
    }
  }
  return label;
}

// One block per sequence and one thread per token, which reads its column of the symmetric matrix: neighbouring threads
// read neighbouring memory.
__global__ void __launch_bounds__(kSequenceThreads, 2)
    assign_clusters(Batch batch, const float* squares, const int64_t* cluster_counts, int64_t neighbours,
                    Findings all, int64_t* assignment) {
  const Sequence sequence(batch, blockIdx.x);
  const int size = sequence.size;
  const int clusters = static_cast<int>(cluster_counts[blockIdx.x]);
  const int nearby = static_cast<int>(neighbours < size ? neighbours : size);
  const float width = static_cast<float>(batch.width);
  const float* matrix = squares + sequence.matrix;
  const Findings found = {all.spread + sequence.begin, all.farthest + sequence.begin, all.importance + sequence.begin,
                          all.centre + sequence.begin};
  int64_t* label = assignment + sequence.begin;

  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    found.spread[i] = sum_of_nearest(matrix + i, size, nearby) / (static_cast<float>(nearby) * width);
    float farthest = 0.0f;
    for (int j = 0; j < size; ++j) farthest = fmaxf(farthest, matrix[static_cast<int64_t>(j) * size + i]);
    found.farthest[i] = farthest;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    found.importance[i] = importance_of(i, matrix + i, size, width, found);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const int rank = rank_of(i, size, found.importance);
    label[i] = rank;
    if (rank < clusters) found.centre[rank] = i;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    // A centre's label is its rank.
    if (label[i] >= clusters) label[i] = nearest_centre(matrix + i, size, clusters, found.centre);
  }
}

template <typename Token>
cudaError_t launch_distances(const Batch& batch, const Token* tokens, int64_t longest, float* squares, void* stream) {
  const int64_t rows = (longest + kTile - 1) / kTile;
  const dim3 grid(static_cast<unsigned>(batch.count), static_cast<unsigned>(rows * (rows + 1) / 2));
  return launch(square_distances<Token>, grid, kTileThreads, stream, batch, tokens, squares);
}

}  // namespace
}  // namespace atomas

// Labels of every token within its sequence. `squares` has room for the sum of squared lengths, `findings` for four
// values per token; `longest` is the largest length, at least 1.
ATOMAS_OPERATOR int atomas_dpc_knn(int device, void* stream, atomas::Dtype dtype, const void* tokens,
                                   const int64_t* lengths, const int64_t* ends, const int64_t* cluster_counts,
                                   int64_t count, int64_t total, int64_t longest, int64_t width, int64_t neighbours,
                                   float* squares, float* findings, int64_t* assignment) {
  using namespace atomas;
  const Batch batch = {lengths, ends, count, width};
  cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  status = with_dtype(dtype, tokens, [&](auto* typed) {
    return launch_distances(batch, typed, longest, squares, stream);
  });
  if (status != cudaSuccess) return status;
  const Findings found = {findings, findings + total, findings + 2 * total,
                          reinterpret_cast<int*>(findings + 3 * total)};
  const int64_t whole_warps = (longest + 31) / 32 * 32;
  const int threads = static_cast<int>(whole_warps < kSequenceThreads ? whole_warps : kSequenceThreads);
  return launch(assign_clusters, dim3(static_cast<unsigned>(count)), threads, stream, batch, squares, cluster_counts,
                neighbours, found, assignment);
}
