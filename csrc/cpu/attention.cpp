// T5 attention over packed sequences: one task is one head of one sequence, whose logits exist for a few queries at a
// time only. The backward pass makes them again from the logarithms of the denominators. Which weights are dropped is a
// function of the seed, the query, the head and the key, so that no mask is kept.

#include "dropout.h"
#include "kernels.h"
#include "tiles.h"

namespace atomas {
namespace ATOMAS_ISA {
namespace {

// Queries of one block: their logits stay in the cache, and a sum over them is long enough for the registers to pay.
constexpr int64_t kBlock = 4 * kTileRows;

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// Memory of one thread, carved out of a piece of `end` numbers.
struct Scratch {
  Scratch(const Attention& p, int64_t queries, int64_t keys, bool backward, float* memory)
      : stride(round_up(round_up(keys, kTileColumns) + kTileRows, kLanes)), width(round_up(p.width, kTileColumns)) {
    const auto take = [&](int64_t count) {
      float* piece = memory == nullptr ? nullptr : memory + end;
      end += round_up(count, kLanes);
      return piece;
    };
    key_columns = take(p.width * stride);
    rows = take(keys * width);
    key_bias = take(stride);
    distance_bias = take(queries + stride + kLanes);
    logits = take(kBlock * stride);
    query = take(kBlock * width);
    output = take(kBlock * width);
    if (!backward) return;
    value_columns = take(p.width * stride);
    grad_logits = take(kBlock * stride);
    grad_output = take(kBlock * width);
    grad_key = take((keys + kTileRows) * width);
    grad_value = take((keys + kTileRows) * width);
    grad_key_bias = take(stride);
    grad_distance_bias = take(queries + stride + kLanes);
  }

  const int64_t stride;  // from one query's logits to the next
  const int64_t width;   // from one row of queries, keys or values to the next
  float* key_columns;    // [p.width, stride]
  float* rows;           // [keys, width]: values, in the backward pass keys
  float* key_bias;       // -infinity behind the last key
  float* distance_bias;  // for key - query, beginning with the last query's distance to key 0
  float *logits, *query, *output;  // of a block
  float *value_columns, *grad_logits, *grad_output, *grad_key, *grad_value, *grad_key_bias, *grad_distance_bias;
  int64_t end = 0;
};

// One head of one sequence.
struct Head {
  Head(const Attention& p, int64_t task)
      : p(p),
        sequence(task / p.heads),
        head(task % p.heads),
        first_query(p.query_start[sequence]),
        first_key(p.key_start[sequence]),
        queries(p.query_start[sequence + 1] - first_query),
        keys(p.key_start[sequence + 1] - first_key) {}

  const float* row(const HeadRows& of, int64_t i) const { return of.data + i * of.stride + head * p.width; }
  float* row(float* of, int64_t i) const { return of + (i * p.heads + head) * p.width; }
  int64_t place(int64_t query) const { return (first_query + query) * p.heads + head; }

  // Keys that the queries before `query` read.
  int64_t seen(int64_t query) const { return p.causal ? smaller(keys, query) : keys; }

  Dropout dropout(int64_t query) const {
    return {p.seed, static_cast<uint64_t>(place(query)), p.threshold};
  }

  const Attention& p;
  const int64_t sequence, head, first_query, first_key, queries, keys;
};

// [count, width] rows of one head, zeros behind them up to `room` rows and to the scratch's width.
inline void copy_rows(const Head& h, const HeadRows& from, int64_t first, int64_t count, int64_t room, int64_t width,
                      float* to) {
  for (int64_t i = 0; i < room; ++i, to += width) {
    const int64_t copied = i < count ? h.p.width : 0;
    if (copied) std::memcpy(to, h.row(from, first + i), static_cast<size_t>(copied) * sizeof(float));
    std::memset(to + copied, 0, static_cast<size_t>(width - copied) * sizeof(float));
  }
}

// The transpose [width, stride] of the keys' or the values' rows, zeros behind the last one.
inline void copy_columns(const Head& h, const HeadRows& from, int64_t stride, float* to) {
  for (int64_t j = 0; j < h.keys; ++j) {
    const float* row = h.row(from, h.first_key + j);
    for (int64_t d = 0; d < h.p.width; ++d) to[d * stride + j] = row[d];
  }
  for (int64_t d = 0; d < h.p.width; ++d) {
    for (int64_t j = h.keys; j < stride; ++j) to[d * stride + j] = 0;
  }
}

inline void load_biases(const Head& h, const Scratch& s) {
  for (int64_t j = 0; j < s.stride; ++j) {
    s.key_bias[j] = j >= h.keys ? -kInfinity : h.p.key_bias == nullptr ? 0.0f : h.p.key_bias[h.first_key + j];
  }
  const int64_t reach = h.p.reach;
  const float* table = h.p.distance_bias == nullptr ? nullptr : h.p.distance_bias + h.head * (2 * reach + 1) + reach;
  for (int64_t i = 0; i < h.queries + s.stride; ++i) {
    const int64_t distance = i - (h.queries - 1);
    s.distance_bias[i] = table == nullptr ? 0.0f : table[smaller(larger(distance, -reach), reach)];
  }
}

// out[rows, columns] = left[rows, depth] * right[depth, columns], both in whole tiles.
inline void product(const float* left, int64_t left_stride, const float* right, int64_t right_stride, int64_t rows,
                    int64_t columns, int64_t depth, float* out, int64_t stride) {
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      tile<Product, kTileRows, false>(left + i * left_stride, {left_stride, 1}, right + j, right_stride, depth,
                                      out + i * stride + j, stride);
    }
  }
}

// out[columns of left, width] += left[rows, columns of left]^T * right[rows, width]
inline void add_transposed_product(const float* left, int64_t left_stride, const float* right, int64_t width,
                                   int64_t rows, int64_t columns, float* out) {
  for (int64_t i = 0; i < columns; i += kTileRows) {
    for (int64_t j = 0; j < width; j += kTileColumns) {
      tile<Product, kTileRows, true>(left + i, {1, left_stride}, right + j, width, rows, out + i * width + j, width);
    }
  }
}

// Adds the biases to a query's products, in place.
inline Floats biased(const Head& h, const Scratch& s, const float* products, int64_t query, int64_t j) {
  const Floats value =
      load(products + j) + load(s.distance_bias + h.queries - 1 - query + j) + load(s.key_bias + j);
  if (!h.p.causal) return value;
  return lane_numbers() + static_cast<int32_t>(j) <= splat(static_cast<int32_t>(query)) ? value : splat(-kInfinity);
}

void forward(const AttentionForward& p, const Head& h, const Scratch& s) {
  if (h.keys == 0) {
    for (int64_t i = 0; i < h.queries; ++i) {
      std::memset(h.row(p.output, h.first_query + i), 0, static_cast<size_t>(p.width) * sizeof(float));
      p.normalizer[h.place(i)] = 0;
    }
    return;
  }
  copy_columns(h, p.key, s.stride, s.key_columns);
  copy_rows(h, p.value, h.first_key, h.keys, h.keys, s.width, s.rows);
  load_biases(h, s);
  for (int64_t first = 0; first < h.queries; first += kBlock) {
    const int64_t count = smaller(kBlock, h.queries - first), rows = round_up(count, kTileRows);
    const int64_t seen = h.seen(first + count), columns = round_up(seen, kTileColumns);
    copy_rows(h, p.query, h.first_query + first, count, rows, s.width, s.query);
    product(s.query, s.width, s.key_columns, s.stride, rows, columns, p.width, s.logits, s.stride);
    float inverse[kBlock];
    for (int64_t i = 0; i < count; ++i) {
      float* row = s.logits + i * s.stride;
      Floats most = splat(-kInfinity);
      for (int64_t j = 0; j < columns; j += kLanes) {
        const Floats value = biased(h, s, row, first + i, j);
        store(row + j, value);
        most = maximum(value, most);
      }
      const float highest = lane_maximum(most), shift = highest == -kInfinity ? 0.0f : highest;
      const Dropout dropout = h.dropout(first + i);
      Floats sums{};
      for (int64_t j = 0; j < columns; j += kLanes) {
        const Floats value = exponential(load(row + j) - splat(shift));
        sums += value;
        store(row + j, p.threshold ? dropout(value, j) : value);
      }
      const float sum = lane_sum(sums);
      inverse[i] = sum == 0 ? 0.0f : p.scale / sum;
      p.normalizer[h.place(first + i)] = sum == 0 ? 0.0f : shift + __builtin_logf(sum);
    }
    product(s.logits, s.stride, s.rows, s.width, rows, s.width, seen, s.output, s.width);
    for (int64_t i = 0; i < count; ++i) {
      float* to = h.row(p.output, h.first_query + first + i);
      for (int64_t d = 0; d < p.width; ++d) to[d] = s.output[i * s.width + d] * inverse[i];
    }
  }
}

// Weights and gradients of the logits of one query, from its products with keys and of its gradient with values.
void differentiate(const AttentionBackward& p, const Head& h, const Scratch& s, int64_t query, int64_t columns,
                   float own, float* weights, float* gradients) {
  const Floats normalizer = splat(p.normalizer[h.place(query)]);
  const Floats scale = splat(p.scale), mean = splat(own);
  const Dropout dropout = h.dropout(query);
  float* by_distance = s.grad_distance_bias + h.queries - 1 - query;
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Floats weight = exponential(biased(h, s, weights, query, j) - normalizer);
    const Floats kept = (p.threshold ? dropout(weight, j) : weight) * scale;
    const Floats gradient = kept * load(gradients + j) - weight * mean;
    store(weights + j, kept);
    store(gradients + j, gradient);
    if (p.grad_distance_bias != nullptr) store(by_distance + j, load(by_distance + j) + gradient);
    if (p.grad_key_bias != nullptr) store(s.grad_key_bias + j, load(s.grad_key_bias + j) + gradient);
  }
}

// `grad_table` [2 reach + 1] is this task's own.
void backward(const AttentionBackward& p, const Head& h, const Scratch& s, float* grad_table) {
  copy_columns(h, p.key, s.stride, s.key_columns);
  copy_columns(h, p.value, s.stride, s.value_columns);
  copy_rows(h, p.key, h.first_key, h.keys, h.keys, s.width, s.rows);
  load_biases(h, s);
  const auto clear = [](float* values, int64_t count) {
    std::memset(values, 0, static_cast<size_t>(count) * sizeof(float));
  };
  clear(s.grad_key, (h.keys + kTileRows) * s.width);
  clear(s.grad_value, (h.keys + kTileRows) * s.width);
  clear(s.grad_key_bias, s.stride);
  clear(s.grad_distance_bias, h.queries + s.stride);
  for (int64_t first = 0; first < h.queries && h.keys > 0; first += kBlock) {
    const int64_t count = smaller(kBlock, h.queries - first), rows = round_up(count, kTileRows);
    const int64_t seen = h.seen(first + count), columns = round_up(seen, kTileColumns);
    copy_rows(h, p.query, h.first_query + first, count, rows, s.width, s.query);
    copy_rows(h, p.grad_output, h.first_query + first, count, rows, s.width, s.grad_output);
    float *weights = s.logits, *gradients = s.grad_logits;
    product(s.query, s.width, s.key_columns, s.stride, rows, columns, p.width, weights, s.stride);
    product(s.grad_output, s.width, s.value_columns, s.stride, rows, columns, p.width, gradients,
            s.stride);
    for (int64_t i = 0; i < count; ++i) {
      const float* output = h.row(p.output, h.first_query + first + i);
      float own = 0;
      for (int64_t d = 0; d < p.width; ++d) own += output[d] * s.grad_output[i * s.width + d];
      float *of_weights = weights + i * s.stride, *of_gradients = gradients + i * s.stride;
      differentiate(p, h, s, first + i, columns, own, of_weights, of_gradients);
      clear(of_weights + columns, kTileRows);
      clear(of_gradients + columns, kTileRows);
    }
    product(gradients, s.stride, s.rows, s.width, rows, s.width, seen, s.output, s.width);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(h.row(p.grad_query, h.first_query + first + i), s.output + i * s.width,
                  static_cast<size_t>(p.width) * sizeof(float));
    }
    add_transposed_product(gradients, s.stride, s.query, s.width, count, seen, s.grad_key);
    add_transposed_product(weights, s.stride, s.grad_output, s.width, count, seen, s.grad_value);
  }
  if (h.keys == 0) {
    for (int64_t i = 0; i < h.queries; ++i) clear(h.row(p.grad_query, h.first_query + i), p.width);
  }
  for (int64_t j = 0; j < h.keys; ++j) {
    const size_t bytes = static_cast<size_t>(p.width) * sizeof(float);
    std::memcpy(h.row(p.grad_key, h.first_key + j), s.grad_key + j * s.width, bytes);
    std::memcpy(h.row(p.grad_value, h.first_key + j), s.grad_value + j * s.width, bytes);
    if (p.grad_key_bias != nullptr) {
      p.grad_key_bias[(h.first_key + j) * p.heads + h.head] = s.grad_key_bias[j];
    }
  }
  if (p.grad_distance_bias == nullptr) return;
  clear(grad_table, 2 * p.reach + 1);
  for (int64_t i = 0; i < h.queries + h.keys - 1; ++i) {
    const int64_t distance = i - (h.queries - 1);
    grad_table[smaller(larger(distance, -p.reach), p.reach) + p.reach] += s.grad_distance_bias[i];
  }
}

template <class Body>
void for_each_head(const Attention& p, bool backward, const Body& body) {
  int64_t queries = 0, keys = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    queries = larger(queries, p.query_start[i + 1] - p.query_start[i]);
    keys = larger(keys, p.key_start[i + 1] - p.key_start[i]);
  }
  const int64_t size = Scratch(p, queries, keys, backward, nullptr).end;
  const Buffer<float> memory(p.threads * size);
  for_each_task(p.count * p.heads, p.threads, [&](int64_t worker, int64_t task) {
    body(Head(p, task), Scratch(p, queries, keys, backward, memory.data() + worker * size));
  });
}

}  // namespace

void attention_forward(const AttentionForward& p) {
  for_each_head(p, false, [&](const Head& h, const Scratch& s) { forward(p, h, s); });
}

void attention_backward(const AttentionBackward& p) {
  const int64_t distances = 2 * p.reach + 1, table = p.heads * distances;
  // Of each sequence, added up in their order.
  const Buffer<float> tables(p.grad_distance_bias == nullptr ? 0 : p.count * table);
  for_each_head(p, true, [&](const Head& h, const Scratch& s) {
    backward(p, h, s, tables.data() + h.sequence * table + h.head * distances);
  });
  if (p.grad_distance_bias == nullptr) return;
  for (int64_t d = 0; d < table; ++d) p.grad_distance_bias[d] = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    for (int64_t d = 0; d < table; ++d) p.grad_distance_bias[d] += tables[i * table + d];
  }
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
