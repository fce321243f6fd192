// Soft-target contrastive cross entropy (method.md 2) in one pass over keys and queue.
//
// With student logits x and teacher logits y of one query against key k, and p, q their softmax,
//   loss = lse(x) - alpha sum_k q_k x_k - (1 - alpha) x_own,   d loss / d x_k = p_k - alpha q_k - (1 - alpha) [k = own].
// A tile of keys is read once, while it lies in the cache: its logits, their exponentials below the largest logit so
// far, and the sums of e^(x - m), e^(x - m) x and e^(x - m) k, which are rescaled when m grows (likewise with y). No
// logits remain, and the queries' gradient is ready with the loss.
//
// Student and teacher need a sum of keys each, since the denominators are known only at the end: four products instead
// of three. Three would take a second pass over the keys and memory for every logit.
//
// Work is cut by the sizes alone and its parts are added in order: bitwise the same for every number of threads.

#include <math.h>

#include "convert.h"
#include "tiles.h"

namespace atomas {
namespace ATOMAS_ISA {
namespace {

// Queries of one block, and keys of one tile (a multiple of the rows of a tile): with D = 768 the block's sums of keys
// and the tile's keys fill the second-level cache.
constexpr int64_t kQueries = 32;
constexpr int64_t kKeys = 24;
static_assert(kQueries % kLanes == 0 && kKeys % kTileRows == 0, "whole vectors and tiles");
constexpr int64_t kSumRows = kLanes == 16 ? 8 : 6;
constexpr int64_t kLine = 64 / sizeof(float);
// Parts that the work is cut into, and the keys of the smallest.
constexpr int64_t kParts = 64;
constexpr int64_t kLeastKeys = 8 * kKeys;
// Below every logit, and further below: an ignored key's exponential is 0 even where nothing else was seen.
constexpr float kNothing = -1e30f;
constexpr float kIgnored = -3e38f;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The queries divided by the temperature, in blocks: the columns of a block are its queries and then their momentum
// queries, each filled up with zeros to whole vectors.
class Queries {
 public:
  explicit Queries(const Contrastive& p)
      : p_(p),
        half_(round_up(smaller(p.count, kQueries), kLanes)),
        row_(row_of(p.width)),
        values_(blocks() * columns() * row_),
        packed_(blocks() * columns() * p.width) {}

  void fill(int64_t block) const {
    for (int64_t column = 0; column < columns(); ++column) {
      float* to = values_.data() + (block * columns() + column) * row_;
      const int64_t i = column % half_;
      for (int64_t d = 0; d < row_; ++d) to[d] = 0;
      if (i >= count(block)) continue;
      const float* from = (column < half_ ? p_.query : p_.momentum_query) + (block * kQueries + i) * p_.width;
      for (int64_t d = 0; d < p_.width; ++d) to[d] = from[d] / p_.temperature;
    }
    const float* rows = values_.data() + block * columns() * row_;
    for (int64_t j = 0; j < columns(); j += kTileColumns) {
      float* panel = packed_.data() + (block * columns() + j) * p_.width;
      for (int64_t c = 0; c < kTileColumns; ++c) {
        for (int64_t d = 0; d < p_.width; ++d) panel[d * kTileColumns + c] = rows[(j + c) * row_ + d];
      }
    }
  }

  int64_t blocks() const { return ceil_div(p_.count, kQueries); }
  int64_t count(int64_t block) const { return smaller(kQueries, p_.count - block * kQueries); }
  int64_t columns() const { return 2 * half_; }
  int64_t half() const { return half_; }
  // Of a row of logits: the sums read it in whole tiles.
  int64_t stride() const { return round_up(columns(), kSumRows); }
  // Of a row of keys or queries: whole tiles, and an odd number of cache lines, or rows below one another would fight
  // for the same sets of the cache.
  int64_t row() const { return row_; }
  const float* values(int64_t block) const { return values_.data() + block * columns() * row_; }

  // logits[k * stride + column] of staged keys; `keys` and `logits` have room for whole tiles.
  void logits(int64_t block, const float* keys, int64_t count, float* logits) const {
    for (int64_t j = 0; j < columns(); j += kTileColumns) {
      const float* panel = packed_.data() + (block * columns() + j) * p_.width;
      for (int64_t k = 0; k < count; k += kTileRows) {
        tile<Product, kTileRows, false>(keys + k * row_, {row_, 1}, panel, kTileColumns, p_.width,
                                        logits + k * stride() + j, stride());
      }
    }
  }

 private:
  static int64_t row_of(int64_t width) { return (ceil_div(round_up(width, kTileColumns), kLine) | 1) * kLine; }

  const Contrastive& p_;
  int64_t half_;
  int64_t row_;
  Buffer<float> values_;
  Buffer<float> packed_;
};

// A tile of keys as float32 rows, and its logits.
struct Tile {
  Tile(const Queries& queries, int threads)
      : queries(queries),
        keys_of(threads * kKeys * queries.row()),
        logits_of(threads * kKeys * queries.stride()) {
    // What fills up rows and columns is never written again.
    std::memset(keys_of.data(), 0, static_cast<size_t>(threads * kKeys * queries.row()) * sizeof(float));
    std::memset(logits_of.data(), 0, static_cast<size_t>(threads * kKeys * queries.stride()) * sizeof(float));
  }

  float* keys(int64_t worker) const { return keys_of.data() + worker * kKeys * queries.row(); }
  float* logits(int64_t worker) const { return logits_of.data() + worker * kKeys * queries.stride(); }

  // Tokens [first, first + count) of keys and queue, which do not straddle the two.
  void stage(const Contrastive& p, int64_t worker, int64_t first, int64_t count) const {
    const Matrix& source = first < p.keys.rows ? p.keys : p.queue;
    const int64_t row = first < p.keys.rows ? first : first - p.keys.rows;
    float* to = keys(worker);
    for (int64_t k = 0; k < count; ++k) copy_row(source, row + k, to + k * queries.row());
    // A leftover that is not finite would not matter to the other rows, but cost time.
    for (int64_t i = count * queries.row(); i < round_up(count, kTileRows) * queries.row(); ++i) to[i] = 0;
  }

  const Queries& queries;
  Buffer<float> keys_of, logits_of;
};

int64_t tile_end(const Contrastive& p, int64_t first, int64_t end) {
  return smaller(first + kKeys, first < p.keys.rows ? smaller(end, p.keys.rows) : end);
}

bool ignored(const Contrastive& p, int64_t query, int64_t key) {
  return p.ignore != nullptr && p.ignore[query * (p.keys.rows + p.queue.rows) + key] && p.positive[query] != key;
}

// What one block of queries sums over one range of keys. A column's `moment` is the sum of e^(. - m) x, with x the
// student's logit in the teacher's columns too.
struct Part {
  float* maximum;  // [columns]
  double* sum;     // [columns]
  double* moment;  // [columns]
  float* key_sum;  // [columns up to whole tiles, row] or null
};

class Pass {
 public:
  Pass(const ContrastiveForward& p, const Queries& queries)
      : p_(p),
        queries_(queries),
        keys_(p.keys.rows + p.queue.rows),
        ranges_(larger(1, smaller(ceil_div(kParts, queries.blocks()), keys_ / kLeastKeys))),
        parts_(queries.blocks() * ranges_),
        tile_(queries, p.threads),
        maximum_(parts_ * queries.columns()),
        sum_(parts_ * queries.columns()),
        moment_(parts_ * queries.columns()),
        key_sum_(p.grad_query == nullptr ? 0 : parts_ * queries.stride() * queries.row()),
        own_logit_(p.count),
        row_loss_(p.count),
        row_slope_(p.count),
        own_key_(p.threads * queries.row()) {}

  int64_t parts() const { return parts_; }

  void absorb_part(int64_t worker, int64_t index) const {
    const int64_t block = index / ranges_, range = index % ranges_;
    const Part part = part_of(index);
    for (int64_t column = 0; column < queries_.columns(); ++column) {
      part.maximum[column] = kNothing;
      part.sum[column] = part.moment[column] = 0;
    }
    if (part.key_sum != nullptr) {
      std::memset(part.key_sum, 0, static_cast<size_t>(queries_.stride() * queries_.row()) * sizeof(float));
    }
    const int64_t end = keys_ * (range + 1) / ranges_;
    for (int64_t first = keys_ * range / ranges_; first < end;) {
      const int64_t last = tile_end(p_, first, end), count = last - first;
      float* logits = tile_.logits(worker);
      tile_.stage(p_, worker, first, count);
      queries_.logits(block, tile_.keys(worker), count, logits);
      note_own_and_ignored(block, first, count, logits);
      for (int64_t i = 0; i < queries_.half(); i += kLanes) absorb_logits(part, i, count, logits);
      if (part.key_sum != nullptr) add_keys(part.key_sum, tile_.keys(worker), count, logits);
      first = last;
    }
  }

  // Loss and gradient of one query from the parts of its block.
  void finish(int64_t worker, int64_t query) const {
    const int64_t block = query / kQueries, column = query % kQueries;
    const Whole student = whole(block, column), teacher = whole(block, column + queries_.half());
    const double own = 1 - static_cast<double>(p_.alpha), alpha = p_.alpha;
    const double expected = alpha * teacher.moment / teacher.sum + own * own_logit_[query];
    p_.normalizer[query] = static_cast<float>(student.maximum + log(student.sum));
    p_.normalizer[p_.count + query] = static_cast<float>(teacher.maximum + log(teacher.sum));
    row_loss_[query] = student.maximum + log(student.sum) - expected;
    row_slope_[query] = student.moment / student.sum - expected;
    if (p_.grad_query == nullptr) return;

    const double mean = 1 / (static_cast<double>(p_.temperature) * static_cast<double>(p_.count));
    float* gradient = p_.grad_query + query * p_.width;
    float* own_key = own_key_.data() + worker * queries_.row();
    copy_row(p_.keys, p_.positive[query], own_key);
    const float own_factor = static_cast<float>(-own * mean);
    for (int64_t d = 0; d < p_.width; ++d) gradient[d] = own_factor * own_key[d];
    for (int64_t range = 0; range < ranges_; ++range) {
      const Part part = part_of(block * ranges_ + range);
      add_key_sum(part, column, student, mean, gradient);
      add_key_sum(part, column + queries_.half(), teacher, -alpha * mean, gradient);
    }
  }

  void finish_all() const {
    double loss = 0, slope = 0;
    for (int64_t i = 0; i < p_.count; ++i) {
      loss += row_loss_[i];
      slope += row_slope_[i];
    }
    const double count = static_cast<double>(p_.count);
    *p_.loss = static_cast<float>(loss / count);
    if (p_.grad_temperature != nullptr) *p_.grad_temperature = static_cast<float>(-slope / (count * p_.temperature));
  }

 private:
  struct Whole {
    double maximum, sum, moment;
  };

  Part part_of(int64_t index) const {
    const int64_t column = index * queries_.columns();
    float* key_sum = p_.grad_query == nullptr ? nullptr : key_sum_.data() + index * queries_.stride() * queries_.row();
    return {maximum_.data() + column, sum_.data() + column, moment_.data() + column, key_sum};
  }

  void note_own_and_ignored(int64_t block, int64_t first, int64_t count, float* logits) const {
    for (int64_t i = 0; i < queries_.count(block); ++i) {
      const int64_t query = block * kQueries + i, own = p_.positive[query] - first;
      if (own >= 0 && own < count) own_logit_[query] = logits[own * queries_.stride() + i];
      if (p_.ignore == nullptr) continue;
      for (int64_t k = 0; k < count; ++k) {
        float* row = logits + k * queries_.stride();
        if (ignored(p_, query, first + k)) row[i] = row[i + queries_.half()] = kIgnored;
      }
    }
  }

  // Takes in the logits of kLanes queries, which become exponentials.
  void absorb_logits(const Part& part, int64_t i, int64_t count, float* logits) const {
    const int64_t j = i + queries_.half(), stride = queries_.stride();
    Floats student = load(part.maximum + i), teacher = load(part.maximum + j);
    const Floats student_before = student, teacher_before = teacher;
    for (int64_t k = 0; k < count; ++k) {
      const Floats x = load(logits + k * stride + i), y = load(logits + k * stride + j);
      student = x > student ? x : student;
      teacher = y > teacher ? y : teacher;
    }
    Floats sums[2] = {}, moments[2] = {};
    for (int64_t k = 0; k < count; ++k) {
      float* row = logits + k * stride;
      const Floats x = load(row + i);
      const Floats p = exponential(x - student), q = exponential(load(row + j) - teacher);
      store(row + i, p);
      store(row + j, q);
      sums[0] += p;
      sums[1] += q;
      moments[0] += p * x;
      moments[1] += q * x;
    }
    store(part.maximum + i, student);
    store(part.maximum + j, teacher);
    add(part, i, exponential(student_before - student), sums[0], moments[0]);
    add(part, j, exponential(teacher_before - teacher), sums[1], moments[1]);
  }

  void add(const Part& part, int64_t column, Floats shrink, Floats sum, Floats moment) const {
    for (int64_t lane = 0; lane < kLanes; ++lane, ++column) {
      part.sum[column] = part.sum[column] * shrink[lane] + sum[lane];
      part.moment[column] = part.moment[column] * shrink[lane] + moment[lane];
      if (part.key_sum == nullptr || shrink[lane] == 1.0f) continue;
      float* row = part.key_sum + column * queries_.row();
      for (int64_t d = 0; d < queries_.row(); ++d) row[d] *= shrink[lane];
    }
  }

  void add_keys(float* key_sum, const float* keys, int64_t count, const float* exponentials) const {
    const int64_t row = queries_.row(), stride = queries_.stride();
    for (int64_t d = 0; d < p_.width; d += kTileColumns) {
      for (int64_t i = 0; i < stride; i += kSumRows) {
        tile<Product, kSumRows, true>(exponentials + i, {1, stride}, keys + d, row, count, key_sum + i * row + d, row);
      }
    }
  }

  Whole whole(int64_t block, int64_t column) const {
    Whole all{kNothing, 0, 0};
    for (int64_t range = 0; range < ranges_; ++range) {
      const float maximum = part_of(block * ranges_ + range).maximum[column];
      all.maximum = maximum > all.maximum ? maximum : all.maximum;
    }
    for (int64_t range = 0; range < ranges_; ++range) {
      const Part part = part_of(block * ranges_ + range);
      const double scale = exp(part.maximum[column] - all.maximum);
      all.sum += scale * part.sum[column];
      all.moment += scale * part.moment[column];
    }
    return all;
  }

  void add_key_sum(const Part& part, int64_t column, const Whole& all, double factor, float* gradient) const {
    const float scale = static_cast<float>(factor * exp(part.maximum[column] - all.maximum) / all.sum);
    const float* row = part.key_sum + column * queries_.row();
    for (int64_t d = 0; d < p_.width; ++d) gradient[d] += scale * row[d];
  }

  const ContrastiveForward& p_;
  const Queries& queries_;
  int64_t keys_;
  int64_t ranges_;
  int64_t parts_;
  Tile tile_;
  Buffer<float> maximum_;
  Buffer<double> sum_, moment_;
  Buffer<float> key_sum_;
  Buffer<float> own_logit_;
  Buffer<double> row_loss_, row_slope_;
  Buffer<float> own_key_;
};

}  // namespace

void contrastive_forward(const ContrastiveForward& p) {
  const Queries queries(p);
  const Pass pass(p, queries);
  for_each_task(queries.blocks(), p.threads, [&](int64_t, int64_t block) { queries.fill(block); });
  for_each_task(pass.parts(), p.threads, [&](int64_t worker, int64_t part) { pass.absorb_part(worker, part); });
  for_each_task(p.count, p.threads, [&](int64_t worker, int64_t query) { pass.finish(worker, query); });
  pass.finish_all();
}

void contrastive_key_gradient(const ContrastiveKeyGradient& p) {
  const Queries queries(p);
  const Tile tiles(queries, p.threads);
  const int64_t row = queries.row(), stride = queries.stride();
  const Buffer<float> sums_of(p.threads * kKeys * row);
  for_each_task(queries.blocks(), p.threads, [&](int64_t, int64_t block) { queries.fill(block); });
  for_each_task(ceil_div(p.keys.rows, kKeys), p.threads, [&](int64_t worker, int64_t index) {
    const int64_t first = index * kKeys, count = tile_end(p, first, p.keys.rows) - first;
    float* logits = tiles.logits(worker);
    float* sums = sums_of.data() + worker * kKeys * row;
    std::memset(sums, 0, static_cast<size_t>(kKeys * row) * sizeof(float));
    tiles.stage(p, worker, first, count);
    for (int64_t block = 0; block < queries.blocks(); ++block) {
      queries.logits(block, tiles.keys(worker), count, logits);
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t i = 0; i < queries.count(block); ++i) {
          const int64_t query = block * kQueries + i;
          float* x = logits + k * stride + i;
          const float own = p.positive[query] == first + k ? 1 - p.alpha : 0.0f;
          const float p_k = expf(*x - p.normalizer[query]);
          const float q_k = expf(x[queries.half()] - p.normalizer[p.count + query]);
          *x = ignored(p, query, first + k) ? 0.0f : (p_k - p.alpha * q_k - own) / static_cast<float>(p.count);
        }
      }
      for (int64_t d = 0; d < p.width; d += kTileColumns) {
        for (int64_t k = 0; k < count; k += kTileRows) {
          tile<Product, kTileRows, true>(logits + k * stride, {stride, 1}, queries.values(block) + d, row,
                                         queries.count(block), sums + k * row + d, row);
        }
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      std::memcpy(p.grad_keys + (first + k) * p.width, sums + k * row, static_cast<size_t>(p.width) * sizeof(float));
    }
  });
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
