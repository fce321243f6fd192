// Gradient of the token interaction, from the saved matches.
//
// With H = grad_scores / 2 and unit tokens t, s, text token i of text a receives
//   sum over b of H[a, b] * (w_i * s[match(i, b)] + sum of v_j * s_j over the tokens j of b that match i),
// and its weight w_i the product of t_i with the first sum taken without w_i (kernels.md, section 3.1). SMILES tokens
// receive the mirror image. A task owns some columns of one sequence's rows and adds in a fixed order: no atomics, and
// bitwise the same result for every number of threads.

#include "interaction.h"

namespace atomas {
namespace ATOMAS_ISA {
namespace {

// Columns of one task. Few, so that a chunk of all tokens of the other modality stays in the second-level cache while
// sequence after sequence gathers from it: with whole rows the gathers miss every cache and take four times as long.
constexpr int64_t kChunk = 64;

// One modality's unit tokens by chunks of columns, [chunks][tokens][kChunk], padded with zeros; and what a task makes of
// them.
struct Units {
  explicit Units(const Ragged& ragged)
      : ragged(ragged),
        chunks(round_up(ragged.width, kChunk) / kChunk),
        values(chunks * ragged.total() * kChunk),
        inverse(ragged.total()),
        weight_part(chunks * ragged.total()) {}

  void fill(int64_t sequence) const {
    for (int64_t t = ragged.start[sequence]; t < ragged.start[sequence + 1]; ++t) {
      const float* from = ragged.tokens + t * ragged.width;
      const float scale = inverse[t] = inverse_norm(from, ragged.width);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        float* to = row(chunk, t);
        const int64_t columns = columns_of(chunk);
        for (int64_t d = 0; d < columns; ++d) to[d] = from[chunk * kChunk + d] * scale;
        for (int64_t d = columns; d < kChunk; ++d) to[d] = 0;
      }
    }
  }

  int64_t columns_of(int64_t chunk) const { return smaller(kChunk, ragged.width - chunk * kChunk); }
  float* row(int64_t chunk, int64_t t) const { return values.data() + (chunk * ragged.total() + t) * kChunk; }

  const Ragged& ragged;
  int64_t chunks;
  Buffer<float> values;
  Buffer<float> inverse;
  Buffer<float> weight_part;  // [chunks][tokens]: each chunk's part of the weight's gradient
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

// One chunk of the gradient of sequence a with respect to its unit tokens. pair_of(b): its Pair with sequence b.
template <class PairOf>
void gather(const Units& own, int64_t a, const Units& other, const PairOf& pair_of, int64_t chunk, float* grad_tokens,
            float* scratch) {
  const int64_t begin = own.ragged.start[a], n = own.ragged.size(a);
  if (n == 0) return;  // nothing was matched, so there are no matches to read
  float* matched = scratch;                // [n, kChunk]: unweighted sum of what own tokens match
  float* gradient = scratch + n * kChunk;  // [n, kChunk]
  std::memset(scratch, 0, static_cast<size_t>(2 * n * kChunk) * sizeof(float));
  for (int64_t b = 0; b < other.ragged.count; ++b) {
    const Pair pair = pair_of(b);
    const int64_t m = other.ragged.size(b);
    if (pair.upstream == 0.0f || m == 0) continue;
    const float* rows = other.row(chunk, other.ragged.start[b]);
    const float* weight = other.ragged.weight + other.ragged.start[b];
    for (int64_t i = 0; i < n; ++i) add_scaled(matched + i * kChunk, pair.upstream, rows + pair.own_match[i] * kChunk);
    for (int64_t j = 0; j < m; ++j) {
      add_scaled(gradient + pair.other_match[j] * kChunk, pair.upstream * weight[j], rows + j * kChunk);
    }
  }
  const int64_t columns = own.columns_of(chunk);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = begin + i;
    own.weight_part[chunk * own.ragged.total() + t] = product(own.row(chunk, t), matched + i * kChunk);
    add_scaled(gradient + i * kChunk, own.ragged.weight[t], matched + i * kChunk);
    std::memcpy(grad_tokens + t * own.ragged.width + chunk * kChunk, gradient + i * kChunk,
                static_cast<size_t>(columns) * sizeof(float));
  }
}

// Sums the parts of the weights' gradients, and takes the tokens' through x / ||x||: only the part of the gradient across
// the token's direction remains.
void finish(const Units& own, int64_t a, float* grad_tokens, float* grad_weight) {
  const int64_t width = own.ragged.width;
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

}  // namespace

void interaction_backward(const InteractionBackward& p) {
  const Units text(p.text), smiles(p.smiles);
  const int64_t texts = p.text.count, molecules = p.smiles.count;
  const int64_t scratch_size = 2 * kChunk * larger(longest(p.text), longest(p.smiles));
  const Buffer<float> scratch_of_all(p.threads * scratch_size);
  const auto text_match = [&](int64_t a, int64_t b) { return p.text_match + b * p.text.total() + p.text.start[a]; };
  const auto smiles_match = [&](int64_t a, int64_t b) {
    return p.smiles_match + a * p.smiles.total() + p.smiles.start[b];
  };
  const auto upstream = [&](int64_t a, int64_t b) { return p.grad_scores[a * molecules + b] / 2; };

  for_each_task(texts + molecules, p.threads, [&](int64_t, int64_t i) {
    i < texts ? text.fill(i) : smiles.fill(i - texts);
  });
  for_each_task(text.chunks * (texts + molecules), p.threads, [&](int64_t worker, int64_t index) {
    float* scratch = scratch_of_all.data() + worker * scratch_size;
    const int64_t chunk = index / (texts + molecules), sequence = index % (texts + molecules);
    if (sequence < texts) {
      const int64_t a = sequence;
      const auto pair_of = [&](int64_t b) { return Pair{upstream(a, b), text_match(a, b), smiles_match(a, b)}; };
      gather(text, a, smiles, pair_of, chunk, p.grad_text, scratch);
    } else {
      const int64_t b = sequence - texts;
      const auto pair_of = [&](int64_t a) { return Pair{upstream(a, b), smiles_match(a, b), text_match(a, b)}; };
      gather(smiles, b, text, pair_of, chunk, p.grad_smiles, scratch);
    }
  });
  for_each_task(texts + molecules, p.threads, [&](int64_t, int64_t i) {
    i < texts ? finish(text, i, p.grad_text, p.grad_text_weight)
              : finish(smiles, i - texts, p.grad_smiles, p.grad_smiles_weight);
  });
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
