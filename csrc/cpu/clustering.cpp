// Adaptive polymerisation (method.md 3.1): density-peak clustering and merging, one task per sequence.

#include <math.h>

#include "kernels.h"
#include "tiles.h"

namespace atomas {
namespace ATOMAS_ISA {
namespace {

// Small tiles: a sequence of fragments has hardly more tokens than one of the largest has columns, and of the square only
// the tiles on and above the diagonal are computed.
constexpr int kVectors = kLanes == 16 ? 1 : kTileVectors;
constexpr int kColumns = kVectors * kLanes;
constexpr int kRows = 6;

// Scratch of one thread, for sequences of up to `longest` tokens; matrices have rows of `stride` floats.
struct Room {
  static int64_t panels(int64_t longest, int panel, int64_t width) { return round_up(longest, panel) * width; }
  static int64_t stride(int64_t n) { return round_up(n, kColumns); }

  Room(int64_t longest, int64_t width, int64_t neighbours)
      : rest(kRows * width),
        right(panels(longest, kColumns, width)),
        square(round_up(longest, kRows) * stride(longest)),
        spread(longest),
        importance(longest),
        nearest(neighbours),
        best(stride(longest)),
        centre(longest),
        label(stride(longest)) {}

  Buffer<float> rest, right, square, spread, importance, nearest, best;
  Buffer<int64_t> centre;
  Buffer<int32_t> label;
};

// square[i, j] = ||x_i - x_j||^2, NaN as infinity. Differences, not the Gram form: in single precision that loses the
// small distances, and with them the exact ties of equal tokens.
void square_distances(const float* tokens, int64_t n, int64_t width, const Room& room) {
  const int64_t stride = Room::stride(n);
  float* square = room.square.data();
  pack(tokens, nullptr, n, width, kColumns, room.right.data());
  // The last rows, fewer than a tile's, and zeros; the others are read where they are.
  const int64_t whole = n - n % kRows;
  std::memset(room.rest.data(), 0, static_cast<size_t>(kRows * width) * sizeof(float));
  std::memcpy(room.rest.data(), tokens + whole * width, static_cast<size_t>((n - whole) * width) * sizeof(float));
  for (int64_t j = 0; j < n; j += kColumns) {
    for (int64_t i = 0; i < n && i < j + kColumns; i += kRows) {
      const float* left = i < whole ? tokens + i * width : room.rest.data();
      tile<SquaredDifference, kRows, false, kVectors>(left, {width, 1}, room.right.data() + j * width, kColumns, width,
                                                      square + i * stride + j, stride);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) {
      const float value = square[i * stride + j];
      square[i * stride + j] = value == value ? value : kInfinity;
    }
    for (int64_t j = 0; j < i; ++j) square[i * stride + j] = square[j * stride + i];
  }
}

// Mean of the k smallest of n squared distances, per column of the tokens; the density is exp(-spread).
float spread_of(const float* square, int64_t n, int64_t k, int64_t width, float* nearest) {
  int64_t held = 0;
  for (int64_t j = 0; j < n; ++j) {
    const float value = square[j];
    if (held == k && !(value < nearest[k - 1])) continue;
    int64_t place = held < k ? held++ : k - 1;
    for (; place > 0 && value < nearest[place - 1]; --place) nearest[place] = nearest[place - 1];
    nearest[place] = value;
  }
  float sum = 0;
  for (int64_t j = 0; j < held; ++j) sum += nearest[j];
  return sum / static_cast<float>(held * width);
}

// Square distance to the nearest token of higher density, that is of smaller spread or the same and a lower index; for
// the densest the largest of the sequence.
float separation(const Room& room, int64_t i, int64_t n, float largest) {
  const float* square = room.square.data() + i * Room::stride(n);
  const float own = room.spread[i];
  float nearest = kInfinity;
  bool densest = true;
  for (int64_t j = 0; j < n; ++j) {
    const bool denser = j < i ? room.spread[j] <= own : room.spread[j] < own;
    densest = densest && !denser;
    nearest = denser && square[j] < nearest ? square[j] : nearest;
  }
  return densest ? largest : nearest;
}

void cluster_one(const float* tokens, int64_t n, int64_t width, int64_t neighbours, int64_t clusters, const Room& room,
                 int64_t* assignment) {
  const int64_t stride = Room::stride(n);
  square_distances(tokens, n, width, room);
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = room.square.data() + i * stride;
    room.spread[i] = spread_of(row, n, smaller(neighbours, n), width, room.nearest.data());
    for (int64_t j = 0; j < n; ++j) largest = row[j] > largest ? row[j] : largest;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float value = expf(-room.spread[i]) * sqrtf(separation(room, i, n, largest) / static_cast<float>(width));
    room.importance[i] = value == value ? value : 0.0f;
  }
  // A token's rank is the number of tokens before it: no sort, and equal importance goes by index.
  for (int64_t i = 0; i < n; ++i) {
    int64_t rank = 0;
    for (int64_t j = 0; j < n; ++j) {
      rank += j < i ? room.importance[j] >= room.importance[i] : room.importance[j] > room.importance[i];
    }
    if (rank < clusters) room.centre[rank] = i;
  }
  for (int64_t i = 0; i < n; ++i) {
    room.best[i] = kInfinity;
    room.label[i] = 0;
  }
  for (int64_t c = 0; c < clusters; ++c) {
    const float* row = room.square.data() + room.centre[c] * stride;
    for (int64_t i = 0; i < n; ++i) {
      const bool nearer = row[i] < room.best[i];
      room.best[i] = nearer ? row[i] : room.best[i];
      room.label[i] = nearer ? static_cast<int32_t>(c) : room.label[i];
    }
  }
  for (int64_t i = 0; i < n; ++i) assignment[i] = room.label[i];
  for (int64_t c = 0; c < clusters; ++c) assignment[room.centre[c]] = c;
}

}  // namespace

void cluster(const Clustering& p) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.count; ++b) longest = larger(longest, p.start[b + 1] - p.start[b]);
  const int64_t neighbours = smaller(p.neighbours, longest);
  // Rooms are made here, where running out of memory can be reported.
  struct Rooms {
    explicit Rooms(int count) : room(new Room*[count]()), count(count) {}
    ~Rooms() {
      for (int i = 0; i < count; ++i) delete room[i];
      delete[] room;
    }
    Room** room;
    int count;
  } rooms(p.threads);
  for (int i = 0; i < p.threads; ++i) rooms.room[i] = new Room(longest, p.width, neighbours);

  for_each_task(p.count, p.threads, [&](int64_t worker, int64_t b) {
    const int64_t begin = p.start[b], n = p.start[b + 1] - begin;
    if (n == 0) return;
    cluster_one(p.tokens + begin * p.width, n, p.width, neighbours, p.cluster_counts[b], *rooms.room[worker],
                p.assignment + begin);
  });
}

void merge_forward(const MergeForward& p) {
  constexpr float kWeightFloor = 1e-6f;
  for_each_task(p.count, p.threads, [&](int64_t, int64_t b) {
    const int64_t first = p.cluster_start[b], last = p.cluster_start[b + 1];
    for (int64_t c = first; c < last; ++c) p.weight_sum[c] = 0;
    std::memset(p.merged + first * p.width, 0, static_cast<size_t>((last - first) * p.width) * sizeof(float));
    for (int64_t t = p.start[b]; t < p.start[b + 1]; ++t) {
      const int64_t c = first + p.assignment[t];
      const float weight = p.weight[t];
      const float* from = p.tokens + t * p.width;
      float* to = p.merged + c * p.width;
      p.weight_sum[c] += weight;
      for (int64_t d = 0; d < p.width; ++d) to[d] += weight * from[d];
    }
    for (int64_t c = first; c < last; ++c) {
      p.weight_sum[c] += kWeightFloor;
      float* row = p.merged + c * p.width;
      for (int64_t d = 0; d < p.width; ++d) row[d] /= p.weight_sum[c];
    }
  });
}

void merge_backward(const MergeBackward& p) {
  for_each_task(p.count, p.threads, [&](int64_t, int64_t b) {
    for (int64_t t = p.start[b]; t < p.start[b + 1]; ++t) {
      const int64_t c = p.cluster_start[b] + p.assignment[t];
      const float* token = p.tokens + t * p.width;
      const float* merged = p.merged + c * p.width;
      const float* upstream = p.grad_merged + c * p.width;
      float* out = p.grad_tokens + t * p.width;
      const float share = p.weight[t] / p.weight_sum[c];
      Floats sums = {};
      int64_t d = 0;
      for (; d + kLanes <= p.width; d += kLanes) {
        const Floats gradient = load(upstream + d);
        store(out + d, share * gradient);
        sums += (load(token + d) - load(merged + d)) * gradient;
      }
      float sum = lane_sum(sums);
      for (; d < p.width; ++d) {
        out[d] = share * upstream[d];
        sum += (token[d] - merged[d]) * upstream[d];
      }
      p.grad_weight[t] = sum / p.weight_sum[c];
    }
  });
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
