// Soft-target contrastive cross entropy (method.md 2) without a matrix of logits or a copy of the queue.
//
// With student logits x and teacher logits y of one query against key k, and p, q their softmax,
//   loss = lse(x) - alpha sum_k q_k x_k - (1 - alpha) x_own,
//   d loss / d x_k = p_k - alpha q_k - (1 - alpha) [k = own].
// Keys are taken in tiles that fit the cache, read in place where they can be. There a tile's logits give the sums of
// e^(x - m), e^(x - m) x, e^(y - m) and e^(y - m) x, with m the largest logit so far. For the queries' gradient a second
// pass sums the keys.
//
// One pass would do: the sums of e^(x - m) k and e^(y - m) k could grow with the others. But since their denominators
// are known only at the end these are two products, and with the logits four in all instead of three. The products bind:
// with 32 queries they run at 85 % of a Zen 4 core's peak. Reading the keys a second time costs next to nothing, because
// a tile is fetched from memory while the products of the one before are computed. The logits of some queries are kept
// between the passes.
//
// Work is cut by the sizes alone and its parts are added in order: bitwise the same for every number of threads.

#include <math.h>

#include "convert.h"
#include "tiles.h"

namespace atomas {
namespace ATOMAS_ISA {
namespace {

// Queries of one block, and keys of one tile (a multiple of the rows of a tile): with D = 768 they fit the second-level
// cache together.
constexpr int64_t kQueries = 32;
constexpr int64_t kKeys = 48;
constexpr int64_t kSumRows = kLanes == 16 ? 8 : 4;
static_assert(kQueries % kLanes == 0 && kKeys % kTileRows == 0 && kLanes % kSumRows == 0, "whole vectors and tiles");
constexpr int64_t kLine = 64 / sizeof(float);
constexpr int64_t kPage = 4096 / sizeof(float);
// Parts that the work on some blocks is cut into, and the keys of the smallest.
constexpr int64_t kParts = 16;
constexpr int64_t kLeastKeys = 4 * kKeys;
// Logits that are kept at a time (16 MiB), but those of one block at least.
constexpr int64_t kKeptLogits = 1 << 22;
// Below every logit, and further below: an ignored key's exponential is 0 even where nothing else was seen.
constexpr float kNothing = -1e30f;
constexpr float kIgnored = -3e38f;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tile of keys: whole rows of tiles can be read, with zeros or other numbers behind the last key.
struct Keys {
  int64_t first;      // of all keys
  int64_t count;      // at most kKeys
  const float* rows;  // as float32
  int64_t row;        // numbers from one to the next, whole tiles
  Prefetch next;      // what the next tile is made of
};

// The queries divided by the temperature, in blocks: the columns of a block are its queries and then their momentum
// queries, each filled up with zeros to whole vectors.
class Queries {
 public:
  explicit Queries(const Contrastive& p)
      : p_(p),
        half_(round_up(smaller(p.count, kQueries), kLanes)),
        row_((ceil_div(round_up(p.width, kTileColumns), kLine) | 1) * kLine),
        values_(blocks() * columns() * row_),
        packed_(blocks() * columns() * p.width),
        normalizer_(blocks() * columns()) {}

  void fill(int64_t block) const {
    for (int64_t column = 0; column < columns(); ++column) {
      float* to = values_.data() + (block * columns() + column) * row_;
      const int64_t i = column % half_;
      for (int64_t d = 0; d < row_; ++d) to[d] = 0;
      normalizer_[block * columns() + column] = 0;
      if (i >= count(block)) continue;
      const float* from = (column < half_ ? p_.query : p_.momentum_query) + (block * kQueries + i) * p_.width;
      for (int64_t d = 0; d < p_.width; ++d) to[d] = from[d] / p_.temperature;
    }
    for (int64_t j = 0; j < columns(); j += kTileColumns) {
      float* panel = packed_.data() + (block * columns() + j) * p_.width;
      for (int64_t c = 0; c < kTileColumns; ++c) {
        const float* row = values(block) + (j + c) * row_;
        for (int64_t d = 0; d < p_.width; ++d) panel[d * kTileColumns + c] = row[d];
      }
    }
  }

  int64_t blocks() const { return ceil_div(p_.count, kQueries); }
  int64_t count(int64_t block) const { return smaller(kQueries, p_.count - block * kQueries); }
  int64_t half() const { return half_; }
  int64_t columns() const { return 2 * half_; }
  // Numbers of a row of queries or of staged keys: whole tiles, and an odd number of cache lines, or rows below one
  // another would fight for the same sets of the cache.
  int64_t row() const { return row_; }
  const float* values(int64_t block) const { return values_.data() + block * columns() * row_; }
  // Logarithms of the softmax's denominators, by column.
  float* normalizer(int64_t block) const { return normalizer_.data() + block * columns(); }

  // logits[k * columns + column] of a tile of keys; `logits` has room for whole tiles.
  void logits(int64_t block, Keys& keys, float* logits) const {
    for (int64_t j = 0; j < columns(); j += kTileColumns) {
      const float* panel = packed_.data() + (block * columns() + j) * p_.width;
      for (int64_t k = 0; k < keys.count; k += kTileRows) {
        tile<Product, kTileRows, false>(keys.rows + k * keys.row, {keys.row, 1}, panel, kTileColumns, p_.width,
                                        logits + k * columns() + j, columns(), keys.next);
      }
    }
  }

  // Lowers the logits of ignored keys among [first, first + count) so far that they have no part in anything.
  void ignore(int64_t block, int64_t first, int64_t count, float* logits) const {
    if (p_.ignore == nullptr) return;
    for (int64_t i = 0; i < this->count(block); ++i) {
      const int64_t query = block * kQueries + i, own = p_.positive[query] - first;
      const bool* ignored = p_.ignore + query * (p_.keys.rows + p_.queue.rows) + first;
      for (int64_t k = 0; k < count; ++k) {
        if (ignored[k] && k != own) logits[k * columns() + i] = logits[k * columns() + i + half_] = kIgnored;
      }
    }
  }

  // Of keys [first, first + count): slopes[k * half + i] = d loss / d logit, of the sum over queries, from logits.
  void slopes(int64_t block, int64_t first, int64_t count, const float* logits, float* slopes) const {
    const float* normalizer = this->normalizer(block);
    const Floats alpha = splat(p_.alpha);
    for (int64_t k = 0; k < count; ++k) {
      const float* x = logits + k * columns();
      for (int64_t i = 0; i < half_; i += kLanes) {
        const Floats p = exponential(load(x + i) - load(normalizer + i));
        const Floats q = exponential(load(x + half_ + i) - load(normalizer + half_ + i));
        store(slopes + k * half_ + i, p - alpha * q);
      }
    }
    for (int64_t i = 0; i < this->count(block); ++i) {
      const int64_t own = p_.positive[block * kQueries + i] - first;
      if (own >= 0 && own < count) slopes[own * half_ + i] -= 1 - p_.alpha;
    }
  }

 private:
  const Contrastive& p_;
  int64_t half_;
  int64_t row_;
  Buffer<float> values_;
  Buffer<float> packed_;
  Buffer<float> normalizer_;
};

// Each thread's tile: keys as float32 rows, where they cannot be read in place, their logits and slopes.
class Tiles {
 public:
  Tiles(const Contrastive& p, const Queries& queries)
      : p_(p),
        queries_(queries),
        keys_(p.threads * kKeys * queries.row()),
        logits_(p.threads * kKeys * queries.columns()),
        slopes_(p.threads * kKeys * queries.half()) {
    // What fills up the rows is never written again.
    std::memset(keys_.data(), 0, static_cast<size_t>(p.threads * kKeys * queries.row()) * sizeof(float));
  }

  float* logits(int64_t worker) const { return logits_.data() + worker * kKeys * queries_.columns(); }
  float* slopes(int64_t worker) const { return slopes_.data() + worker * kKeys * queries_.half(); }

  // body(keys) for each tile of keys [begin, end); keys and queue share none.
  template <class Body>
  void for_each(int64_t worker, int64_t begin, int64_t end, const Body& body) const {
    const int64_t fresh = smaller(larger(p_.keys.rows, begin), end);
    for_each_of(p_.keys, 0, worker, begin, fresh, body);
    for_each_of(p_.queue, p_.keys.rows, worker, fresh, end, body);
  }

 private:
  // Those of a matrix whose first row is key `offset`.
  template <class Body>
  void for_each_of(const Matrix& matrix, int64_t offset, int64_t worker, int64_t begin, int64_t end,
                   const Body& body) const {
    for (int64_t first = begin; first < end; first += kKeys) {
      const int64_t count = smaller(kKeys, end - first);
      const int64_t following = smaller(first + kKeys, end);
      const char* next = address(matrix, following - offset);
      Keys keys{first, count, nullptr, 0, {next, address(matrix, smaller(following + kKeys, end) - offset)}};
      if (count == kKeys && readable(matrix)) {
        keys.rows = static_cast<const float*>(rows_from(matrix, first - offset).data);
        keys.row = matrix.stride;
      } else {
        float* staged = keys_.data() + worker * kKeys * queries_.row();
        keys.rows = staged;
        keys.row = queries_.row();
        for (int64_t k = 0; k < count; ++k) copy_row(matrix, first - offset + k, staged + k * queries_.row());
      }
      body(keys);
    }
  }

  // Whether products read the rows in place. Those whole pages apart would all fight for the same sets of the cache.
  static bool readable(const Matrix& matrix) {
    return matrix.type == Float::single && matrix.width % kTileColumns == 0 && matrix.stride % kPage != 0;
  }

  static const char* address(const Matrix& matrix, int64_t row) {
    return static_cast<const char*>(rows_from(matrix, row).data);
  }

  const Contrastive& p_;
  const Queries& queries_;
  Buffer<float> keys_, logits_, slopes_;
};

// Both passes over the keys, for as many blocks of queries at a time as logits can be kept.
class Passes {
 public:
  Passes(const ContrastiveForward& p, const Queries& queries)
      : p_(p),
        queries_(queries),
        tiles_(p, queries),
        keys_(p.keys.rows + p.queue.rows),
        blocks_(smaller(queries.blocks(), larger(1, kKeptLogits / (queries.columns() * keys_)))),
        ranges_(larger(1, smaller(ceil_div(kParts, blocks_), keys_ / kLeastKeys))),
        kept_(differentiable() ? blocks_ * keys_ * queries.columns() : 0),
        key_sum_(differentiable() ? blocks_ * ranges_ * sum_size() : 0),
        maximum_(blocks_ * ranges_ * queries.columns()),
        sum_(blocks_ * ranges_ * queries.columns()),
        moment_(blocks_ * ranges_ * queries.columns()),
        own_logit_(p.count),
        loss_(p.count),
        slope_(p.count) {}

  void run() const {
    for (int64_t first = 0; first < queries_.blocks(); first += blocks_) {
      const int64_t blocks = smaller(blocks_, queries_.blocks() - first);
      const int64_t begin = first * kQueries, count = smaller(blocks * kQueries, p_.count - begin);
      const int64_t parts = blocks * ranges_;
      for_each_task(parts, p_.threads, [&](int64_t worker, int64_t part) { sum_logits(worker, first, part); });
      for_each_task(count, p_.threads, [&](int64_t, int64_t i) { close_logits(first, begin + i); });
      if (!differentiable()) continue;
      for_each_task(parts, p_.threads, [&](int64_t worker, int64_t part) { sum_keys(worker, first, part); });
      for_each_task(count, p_.threads, [&](int64_t, int64_t i) { close_keys(first, begin + i); });
    }
    double loss = 0, slope = 0;
    for (int64_t i = 0; i < p_.count; ++i) {
      loss += loss_[i];
      slope += slope_[i];
    }
    const double count = static_cast<double>(p_.count);
    *p_.loss = static_cast<float>(loss / count);
    if (differentiable()) *p_.grad_temperature = static_cast<float>(-slope / (count * p_.temperature));
  }

 private:
  // Of one column over all keys. The moment is the sum of e^(. - m) x: with the student's x in the teacher's columns too.
  struct Whole {
    double maximum, sum, moment;
  };

  bool differentiable() const { return p_.grad_query != nullptr; }
  // A part's sums of keys: [columns of a tile][queries][kTileColumns].
  int64_t sum_size() const { return round_up(p_.width, kTileColumns) * queries_.half(); }
  int64_t begin_of(int64_t range) const { return keys_ * range / ranges_; }
  float* kept(int64_t block, int64_t key) const { return kept_.data() + (block * keys_ + key) * queries_.columns(); }

  // The first pass of part (block, range).
  void sum_logits(int64_t worker, int64_t first_block, int64_t part) const {
    const int64_t block = part / ranges_, range = part % ranges_, columns = queries_.columns();
    for (int64_t column = part * columns; column < (part + 1) * columns; ++column) {
      maximum_[column] = kNothing;
      sum_[column] = moment_[column] = 0;
    }
    tiles_.for_each(worker, begin_of(range), begin_of(range + 1), [&](Keys& keys) {
      const int64_t first = keys.first, count = keys.count;
      float* logits = tiles_.logits(worker);
      queries_.logits(first_block + block, keys, logits);
      queries_.ignore(first_block + block, first, count, logits);
      for (int64_t i = 0; i < queries_.count(first_block + block); ++i) {
        const int64_t query = (first_block + block) * kQueries + i, own = p_.positive[query] - first;
        if (own >= 0 && own < count) own_logit_[query] = logits[own * columns + i];
      }
      for (int64_t i = 0; i < queries_.half(); i += kLanes) add_logits(part * columns, i, count, logits);
      if (differentiable()) {
        std::memcpy(kept(block, first), logits, static_cast<size_t>(count * columns) * sizeof(float));
      }
    });
  }

  // Takes in the logits of kLanes queries; column 0 of the part is at `base`.
  void add_logits(int64_t base, int64_t i, int64_t count, const float* logits) const {
    const int64_t j = i + queries_.half(), columns = queries_.columns();
    Floats student = load(maximum_.data() + base + i), teacher = load(maximum_.data() + base + j);
    const Floats student_before = student, teacher_before = teacher;
    for (int64_t k = 0; k < count; ++k) {
      const Floats x = load(logits + k * columns + i), y = load(logits + k * columns + j);
      student = x > student ? x : student;
      teacher = y > teacher ? y : teacher;
    }
    Floats sums[2] = {}, moments[2] = {};
    for (int64_t k = 0; k < count; ++k) {
      const Floats x = load(logits + k * columns + i), y = load(logits + k * columns + j);
      const Floats p = exponential(x - student), q = exponential(y - teacher);
      sums[0] += p;
      sums[1] += q;
      moments[0] += p * x;
      moments[1] += q * x;
    }
    store(maximum_.data() + base + i, student);
    store(maximum_.data() + base + j, teacher);
    grow(base + i, exponential(student_before - student), sums[0], moments[0]);
    grow(base + j, exponential(teacher_before - teacher), sums[1], moments[1]);
  }

  void grow(int64_t column, Floats shrink, Floats sum, Floats moment) const {
    for (int64_t lane = 0; lane < kLanes; ++lane, ++column) {
      sum_[column] = sum_[column] * shrink[lane] + sum[lane];
      moment_[column] = moment_[column] * shrink[lane] + moment[lane];
    }
  }

  Whole whole(int64_t block, int64_t column) const {
    Whole all{kNothing, 0, 0};
    const int64_t columns = queries_.columns(), first = block * ranges_ * columns + column;
    for (int64_t range = 0; range < ranges_; ++range) {
      const float maximum = maximum_[first + range * columns];
      all.maximum = maximum > all.maximum ? maximum : all.maximum;
    }
    for (int64_t range = 0; range < ranges_; ++range) {
      const double scale = exp(maximum_[first + range * columns] - all.maximum);
      all.sum += scale * sum_[first + range * columns];
      all.moment += scale * moment_[first + range * columns];
    }
    return all;
  }

  void close_logits(int64_t first_block, int64_t query) const {
    const int64_t block = query / kQueries, column = query % kQueries;
    const Whole student = whole(block - first_block, column);
    const Whole teacher = whole(block - first_block, column + queries_.half());
    const double alpha = p_.alpha;
    const double expected = alpha * teacher.moment / teacher.sum + (1 - alpha) * own_logit_[query];
    const double normalizer = student.maximum + log(student.sum);
    loss_[query] = normalizer - expected;
    slope_[query] = student.moment / student.sum - expected;
    float* kept = queries_.normalizer(block);
    p_.normalizer[query] = kept[column] = static_cast<float>(normalizer);
    p_.normalizer[p_.count + query] = kept[column + queries_.half()] =
        static_cast<float>(teacher.maximum + log(teacher.sum));
  }

  // The second pass of part (block, range).
  void sum_keys(int64_t worker, int64_t first_block, int64_t part) const {
    const int64_t block = part / ranges_, range = part % ranges_, half = queries_.half();
    float* sums = key_sum_.data() + part * sum_size();
    std::memset(sums, 0, static_cast<size_t>(sum_size()) * sizeof(float));
    tiles_.for_each(worker, begin_of(range), begin_of(range + 1), [&](Keys& keys) {
      const int64_t first = keys.first, count = keys.count;
      float* slopes = tiles_.slopes(worker);
      queries_.slopes(first_block + block, first, count, kept(block, first), slopes);
      for (int64_t d = 0; d < p_.width; d += kTileColumns) {
        for (int64_t i = 0; i < half; i += kSumRows) {
          tile<Product, kSumRows, true>(slopes + i, {1, half}, keys.rows + d, keys.row, count,
                                        sums + d * half + i * kTileColumns, kTileColumns, keys.next);
        }
      }
    });
  }

  void close_keys(int64_t first_block, int64_t query) const {
    const int64_t block = query / kQueries - first_block, i = query % kQueries, half = queries_.half();
    const float scale = 1 / (p_.temperature * static_cast<float>(p_.count));
    for (int64_t d = 0; d < p_.width; d += kTileColumns) {
      const float* part = key_sum_.data() + block * ranges_ * sum_size() + d * half + i * kTileColumns;
      float sums[kTileColumns] = {};
      for (int64_t range = 0; range < ranges_; ++range, part += sum_size()) {
        for (int64_t c = 0; c < kTileColumns; ++c) sums[c] += part[c];
      }
      for (int64_t c = 0; c < kTileColumns; ++c) sums[c] *= scale;
      std::memcpy(p_.grad_query + query * p_.width + d, sums,
                  static_cast<size_t>(smaller(kTileColumns, p_.width - d)) * sizeof(float));
    }
  }

  const ContrastiveForward& p_;
  const Queries& queries_;
  Tiles tiles_;
  int64_t keys_;
  int64_t blocks_;  // at a time
  int64_t ranges_;  // of keys: with the blocks the parts of the work
  Buffer<float> kept_;
  Buffer<float> key_sum_;
  Buffer<float> maximum_;        // [parts, columns]
  Buffer<double> sum_, moment_;  // [parts, columns]
  Buffer<float> own_logit_;      // [count]
  Buffer<double> loss_, slope_;  // [count]; the slope is the sum of d loss / d x_k times x_k
};

}  // namespace

void contrastive_forward(const ContrastiveForward& p) {
  const Queries queries(p);
  const Passes passes(p, queries);
  for_each_task(queries.blocks(), p.threads, [&](int64_t, int64_t block) { queries.fill(block); });
  passes.run();
}

void contrastive_key_gradient(const ContrastiveKeyGradient& p) {
  const Queries queries(p);
  const Tiles tiles(p, queries);
  const int64_t row = queries.row(), half = queries.half();
  const Buffer<float> sums_of(p.threads * kKeys * row);
  for_each_task(queries.blocks(), p.threads, [&](int64_t, int64_t block) {
    queries.fill(block);
    for (int64_t i = 0; i < queries.count(block); ++i) {
      queries.normalizer(block)[i] = p.normalizer[block * kQueries + i];
      queries.normalizer(block)[i + half] = p.normalizer[p.count + block * kQueries + i];
    }
  });
  for_each_task(ceil_div(p.keys.rows, kKeys), p.threads, [&](int64_t worker, int64_t index) {
    float* sums = sums_of.data() + worker * kKeys * row;
    std::memset(sums, 0, static_cast<size_t>(kKeys * row) * sizeof(float));
    tiles.for_each(worker, index * kKeys, smaller((index + 1) * kKeys, p.keys.rows), [&](Keys& keys) {
      const int64_t first = keys.first, count = keys.count;
      float* logits = tiles.logits(worker);
      float* slopes = tiles.slopes(worker);
      for (int64_t block = 0; block < queries.blocks(); ++block) {
        queries.logits(block, keys, logits);
        queries.ignore(block, first, count, logits);
        queries.slopes(block, first, count, logits, slopes);
        for (int64_t d = 0; d < p.width; d += kTileColumns) {
          for (int64_t k = 0; k < count; k += kTileRows) {
            tile<Product, kTileRows, true>(slopes + k * half, {half, 1}, queries.values(block) + d, row,
                                           queries.count(block), sums + k * row + d, row);
          }
        }
      }
      for (int64_t k = 0; k < count; ++k) {
        float* gradient = p.grad_keys + (first + k) * p.width;
        for (int64_t d = 0; d < p.width; ++d) gradient[d] = sums[k * row + d] / static_cast<float>(p.count);
      }
    });
  });
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
