// Gradient of the token interaction, from the matches: saved ones, or found again for a group of texts at a time.
//
// With H = grad_scores / 2 and unit tokens t, s, text token i of text a receives
//   sum over b of H[a, b] * (w_i * s[match(i, b)] + sum of v_j * s_j over the tokens j of b that match i),
// and its weight w_i the product of t_i with the first sum taken without w_i (kernels.md, section 3.1). SMILES tokens
// receive the mirror image. A task owns some columns of one sequence's rows and adds in a fixed order, text after text or
// SMILES after SMILES: no atomics, and bitwise the same result for every number of threads and size of group.

#include "convert.h"
#include "interaction.h"

namespace atomas {
namespace ATOMAS_ISA {
namespace {

// Columns of one task. Few, so that a chunk of all tokens of the other modality stays in the second-level cache while
// sequence after sequence gathers from it: with whole rows the gathers miss every cache and take four times as long.
constexpr int64_t kChunk = 64;
// Texts whose matches are found again together: at least one, and no more than this many tokens otherwise. Enough for
// the sums of a sequence of SMILES to be read and written rarely.
constexpr int64_t kGroupTokens = 2048;

// One modality's unit tokens by chunks of columns, [chunks][tokens][kChunk], padded with zeros; and what a task makes of
// them.
struct Units {
  Units(const Ragged& ragged, int threads)
      : ragged(ragged),
        chunks(round_up(ragged.width(), kChunk) / kChunk),
        values(chunks * ragged.total() * kChunk),
        inverse(ragged.total()),
        weight_part(chunks * ragged.total()),
        row_of(threads * ragged.width()) {}

  void fill(int64_t worker, int64_t sequence) const {
    for (int64_t t = ragged.start[sequence]; t < ragged.start[sequence + 1]; ++t) {
      const float* from = rows_of(ragged.tokens, t, 1, row_of.data() + worker * ragged.width());
      const float scale = inverse[t] = inverse_norm(from, ragged.width());
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        float* to = row(chunk, t);
        const int64_t columns = columns_of(chunk);
        for (int64_t d = 0; d < columns; ++d) to[d] = from[chunk * kChunk + d] * scale;
        for (int64_t d = columns; d < kChunk; ++d) to[d] = 0;
      }
    }
  }

  int64_t columns_of(int64_t chunk) const { return smaller(kChunk, ragged.width() - chunk * kChunk); }
  float* row(int64_t chunk, int64_t t) const { return values.data() + (chunk * ragged.total() + t) * kChunk; }

  const Ragged& ragged;
  int64_t chunks;
  Buffer<float> values;
  Buffer<float> inverse;
  Buffer<float> weight_part;  // [chunks][tokens]: each chunk's part of the weight's gradient
  Buffer<float> row_of;       // each thread's token in float32
};

inline void add_scaled(float* to, float scale, const float* from) {
  const Floats factor = splat(scale);
#pragma GCC unroll 16
  for (int64_t d = 0; d < kChunk; d += kLanes) store(to + d, load(to + d) + factor * load(from + d));
}

inline float product(const float* a, const float* b) {
  Floats sum = {};
  for (int64_t d = 0; d < kChunk; d += kLanes) sum += load(a + d) * load(b + d);
  return lane_sum(sum);
}

// The matches and the upstream gradient of one pair, seen from the sequence that is being differentiated ("own").
struct Pair {
  float upstream;
  const int16_t* own_match;    // of each own token: the best token of the other sequence
  const int16_t* other_match;  // of each token of the other sequence: the best own token
};

// Sums of one sequence of n tokens over the sequences it is scored with, for one chunk of columns.
struct Sums {
  Sums(float* room, int64_t n) : matched(room), gradient(room + n * kChunk), size(n * kChunk) {}
  void clear() const { std::memset(matched, 0, static_cast<size_t>(2 * size) * sizeof(float)); }

  float* matched;   // [n, kChunk]: what the tokens match, unweighted
  float* gradient;  // [n, kChunk]: what matches the tokens, weighted
  int64_t size;
};

// Adds the pairs of sequence a with the sequences [first, last) of the other modality. pair_of(b): the Pair with b.
template <class PairOf>
void gather(const Units& own, int64_t a, const Units& other, int64_t first, int64_t last, const PairOf& pair_of,
            int64_t chunk, const Sums& sums) {
  const int64_t n = own.ragged.size(a);
  if (n == 0) return;  // nothing was matched, so there are no matches to read
  for (int64_t b = first; b < last; ++b) {
    const Pair pair = pair_of(b);
    const int64_t m = other.ragged.size(b);
    if (pair.upstream == 0.0f || m == 0) continue;
    const float* rows = other.row(chunk, other.ragged.start[b]);
    const float* weight = other.ragged.weight + other.ragged.start[b];
    for (int64_t i = 0; i < n; ++i) {
      add_scaled(sums.matched + i * kChunk, pair.upstream, rows + pair.own_match[i] * kChunk);
    }
    for (int64_t j = 0; j < m; ++j) {
      add_scaled(sums.gradient + pair.other_match[j] * kChunk, pair.upstream * weight[j], rows + j * kChunk);
    }
  }
}

// One chunk of the gradient of sequence a with respect to its unit tokens, from complete sums.
void close(const Units& own, int64_t a, int64_t chunk, const Sums& sums, float* grad_tokens) {
  const int64_t begin = own.ragged.start[a], n = own.ragged.size(a), columns = own.columns_of(chunk);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = begin + i;
    const float* matched = sums.matched + i * kChunk;
    own.weight_part[chunk * own.ragged.total() + t] = product(own.row(chunk, t), matched);
    add_scaled(sums.gradient + i * kChunk, own.ragged.weight[t], matched);
    std::memcpy(grad_tokens + t * own.ragged.width() + chunk * kChunk, sums.gradient + i * kChunk,
                static_cast<size_t>(columns) * sizeof(float));
  }
}

// Sums the parts of the weights' gradients, and takes the tokens' through x / ||x||: only the part of the gradient across
// the token's direction remains.
void finish(const Units& own, int64_t a, float* grad_tokens, float* grad_weight) {
  const int64_t width = own.ragged.width();
  for (int64_t t = own.ragged.start[a]; t < own.ragged.start[a + 1]; ++t) {
    float* gradient = grad_tokens + t * width;
    float along = 0;
    grad_weight[t] = 0;
    for (int64_t chunk = 0; chunk < own.chunks; ++chunk) {
      grad_weight[t] += own.weight_part[chunk * own.ragged.total() + t];
      float padded[kChunk] = {};
      std::memcpy(padded, gradient + chunk * kChunk, static_cast<size_t>(own.columns_of(chunk)) * sizeof(float));
      along += product(own.row(chunk, t), padded);
    }
    for (int64_t chunk = 0; chunk < own.chunks; ++chunk) {
      const float* unit = own.row(chunk, t);
      float* out = gradient + chunk * kChunk;
      const int64_t columns = own.columns_of(chunk);
      for (int64_t d = 0; d < columns; ++d) out[d] = (out[d] - along * unit[d]) * own.inverse[t];
    }
  }
}

int64_t longest(const Ragged& ragged) {
  int64_t most = 0;
  for (int64_t i = 0; i < ragged.count; ++i) most = larger(most, ragged.size(i));
  return most;
}

// Texts [first, last) and their matches, [molecules][tokens of these texts] and [last - first][SMILES tokens].
struct Group {
  int64_t first, last;
  const int16_t* text_match;
  const int16_t* smiles_match;
};

// Finds the matches of groups of texts again, with the forward pass: one group after the other, in the same memory.
class Matcher {
 public:
  explicit Matcher(const InteractionBackward& p)
      : p_(p),
        texts_(most_texts()),
        text_match_(p.smiles.count * most_tokens()),
        smiles_match_(texts_ * p.smiles.total()),
        start_(texts_ + 1) {}

  int64_t end_of(int64_t first) const {
    int64_t last = smaller(first + 1, p_.text.count);
    while (last < p_.text.count && p_.text.start[last + 1] - p_.text.start[first] <= kGroupTokens) ++last;
    return last;
  }

  Group find(int64_t first) const {
    const int64_t last = end_of(first), begin = p_.text.start[first];
    for (int64_t a = first; a <= last; ++a) start_[a - first] = p_.text.start[a] - begin;
    const Ragged text{rows_from(p_.text.tokens, begin), p_.text.weight + begin, start_.data(), last - first};
    interaction_forward({text, p_.smiles, nullptr, text_match_.data(), smiles_match_.data(), p_.threads});
    return {first, last, text_match_.data(), smiles_match_.data()};
  }

 private:
  int64_t most_texts() const {
    int64_t most = 0;
    for (int64_t first = 0; first < p_.text.count; first = end_of(first)) most = larger(most, end_of(first) - first);
    return most;
  }
  int64_t most_tokens() const {
    int64_t most = 0;
    for (int64_t first = 0; first < p_.text.count; first = end_of(first)) {
      most = larger(most, p_.text.start[end_of(first)] - p_.text.start[first]);
    }
    return most;
  }

  const InteractionBackward& p_;
  int64_t texts_;
  Buffer<int16_t> text_match_, smiles_match_;
  Buffer<int64_t> start_;
};

// The gradient, group after group of texts: those of a group are complete at once, SMILES after the last group.
class Gradient {
 public:
  Gradient(const InteractionBackward& p, bool whole)
      : p_(p),
        text_(p.text, p.threads),
        smiles_(p.smiles, p.threads),
        scratch_size_(2 * kChunk * larger(longest(p.text), longest(p.smiles))),
        scratch_of_(p.threads * scratch_size_),
        smiles_sums_(whole ? 0 : 2 * smiles_.chunks * p.smiles.total() * kChunk),
        whole_(whole) {
    for_each_task(p.text.count + p.smiles.count, p.threads, [&](int64_t worker, int64_t i) {
      i < p.text.count ? text_.fill(worker, i) : smiles_.fill(worker, i - p.text.count);
    });
  }

  void add(const Group& group) const {
    const int64_t texts = group.last - group.first, sequences = texts + p_.smiles.count;
    for_each_task(text_.chunks * sequences, p_.threads, [&](int64_t worker, int64_t index) {
      const int64_t chunk = index / sequences, sequence = index % sequences;
      float* scratch = scratch_of_.data() + worker * scratch_size_;
      if (sequence < texts) {
        add_text(group, group.first + sequence, chunk, scratch);
      } else {
        add_smiles(group, sequence - texts, chunk, scratch);
      }
    });
  }

  void finish() const {
    for_each_task(p_.text.count + p_.smiles.count, p_.threads, [&](int64_t, int64_t i) {
      i < p_.text.count ? atomas::ATOMAS_ISA::finish(text_, i, p_.grad_text, p_.grad_text_weight)
                        : atomas::ATOMAS_ISA::finish(smiles_, i - p_.text.count, p_.grad_smiles, p_.grad_smiles_weight);
    });
  }

 private:
  void add_text(const Group& group, int64_t a, int64_t chunk, float* scratch) const {
    const Sums sums(scratch, p_.text.size(a));
    sums.clear();
    const auto pair_of = [&](int64_t b) {
      return Pair{upstream(a, b), text_match(group, a, b), smiles_match(group, a, b)};
    };
    gather(text_, a, smiles_, 0, p_.smiles.count, pair_of, chunk, sums);
    close(text_, a, chunk, sums, p_.grad_text);
  }

  void add_smiles(const Group& group, int64_t b, int64_t chunk, float* scratch) const {
    const int64_t row = chunk * p_.smiles.total() + p_.smiles.start[b];
    const Sums sums(whole_ ? scratch : smiles_sums_.data() + 2 * row * kChunk, p_.smiles.size(b));
    if (group.first == 0) sums.clear();
    const auto pair_of = [&](int64_t a) {
      return Pair{upstream(a, b), smiles_match(group, a, b), text_match(group, a, b)};
    };
    gather(smiles_, b, text_, group.first, group.last, pair_of, chunk, sums);
    if (group.last == p_.text.count) close(smiles_, b, chunk, sums, p_.grad_smiles);
  }

  float upstream(int64_t a, int64_t b) const { return p_.grad_scores[a * p_.smiles.count + b] / 2; }
  const int16_t* text_match(const Group& group, int64_t a, int64_t b) const {
    const int64_t* start = p_.text.start;
    return group.text_match + b * (start[group.last] - start[group.first]) + start[a] - start[group.first];
  }
  const int16_t* smiles_match(const Group& group, int64_t a, int64_t b) const {
    return group.smiles_match + (a - group.first) * p_.smiles.total() + p_.smiles.start[b];
  }

  const InteractionBackward& p_;
  Units text_, smiles_;
  int64_t scratch_size_;
  Buffer<float> scratch_of_;   // each thread's sums of one sequence
  Buffer<float> smiles_sums_;  // [chunks], by sequence: kept from group to group
  bool whole_;
};

}  // namespace

void interaction_backward(const InteractionBackward& p) {
  const bool saved = p.text_match != nullptr;
  const Gradient gradient(p, saved);
  if (saved) {
    gradient.add({0, p.text.count, p.text_match, p.smiles_match});
  } else {
    const Matcher matcher(p);
    int64_t first = 0;
    do {
      const Group group = matcher.find(first);
      gradient.add(group);
      first = group.last;
    } while (first < p.text.count);
  }
  gradient.finish();
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
