// Gradient of the token interaction, from the saved matches.
//
// With H = grad_scores / 2 and unit tokens t, s, text token i of text a receives
//   sum over b of H[a, b] * (w_i * s[match(i, b)] + sum of v_j * s_j over the tokens j of b that match i),
// and its weight w_i the product of t_i with the first sum taken without w_i (kernels.md, section 3.1). SMILES tokens
// receive the mirror image. A task owns the rows of one sequence and adds in a fixed order: no atomics, and bitwise the
// same result for every number of threads.

#include "interaction.h"

namespace atomas {
namespace ATOMAS_ISA {
namespace {

// Columns done at a time, so that the sums of one sequence stay in the second-level cache.
constexpr int64_t kChunk = 128;

// One modality's unit tokens, in rows padded with zeros to whole vectors.
struct Units {
  explicit Units(const Ragged& ragged)
      : ragged(ragged),
        stride(round_up(ragged.width, kLanes)),
        rows(ragged.total() * stride),
        inverse(ragged.total()) {}

  void fill(int64_t sequence) const {
    for (int64_t t = ragged.start[sequence]; t < ragged.start[sequence + 1]; ++t) {
      const float* from = ragged.tokens + t * ragged.width;
      const float scale = inverse_norm(from, ragged.width);
      inverse[t] = scale;
      float* to = row(t);
      for (int64_t d = 0; d < ragged.width; ++d) to[d] = from[d] * scale;
      for (int64_t d = ragged.width; d < stride; ++d) to[d] = 0;
    }
  }

  float* row(int64_t t) const { return rows.data() + t * stride; }

  const Ragged& ragged;
  int64_t stride;
  Buffer<float> rows;
  Buffer<float> inverse;
};

inline void add_scaled(float* to, float scale, const float* from, int64_t width) {
  const Floats factor = splat(scale);
  for (int64_t d = 0; d < width; d += kLanes) store(to + d, load(to + d) + factor * load(from + d));
}

inline float product(const float* a, const float* b, int64_t width) {
  Floats sum = {};
  for (int64_t d = 0; d < width; d += kLanes) sum += load(a + d) * load(b + d);
  return lane_sum(sum);
}

// The matches and upstream gradients of one pair, seen from the sequence that is being differentiated ("own").
struct Pair {
  float upstream;
  const int16_t* own_match;  // of own token i, at i * own_step: token of the other sequence
  int64_t own_step;
  const int16_t* other_match;  // of the other sequence's token j, at j * other_step: own token
  int64_t other_step;
};

// Gradient rows of own sequence a, and of its weights. pair_of(b) gives the Pair with sequence b of the other side.
template <class PairOf>
void differentiate(const Units& own, int64_t a, const Units& other, const PairOf& pair_of, float* grad_tokens,
                   float* grad_weight, float* scratch) {
  const int64_t begin = own.ragged.start[a], n = own.ragged.size(a), width = own.ragged.width;
  float* matched = scratch;                 // [n, kChunk]: unweighted sum of what own tokens match
  float* gradient = scratch + n * kChunk;   // [n, stride]: with respect to the unit tokens
  for (int64_t i = 0; i < n; ++i) grad_weight[begin + i] = 0;
  std::memset(gradient, 0, static_cast<size_t>(n * own.stride) * sizeof(float));

  for (int64_t d = 0; d < own.stride; d += kChunk) {
    const int64_t columns = smaller(kChunk, own.stride - d);
    std::memset(matched, 0, static_cast<size_t>(n * kChunk) * sizeof(float));
    for (int64_t b = 0; b < other.ragged.count; ++b) {
      const Pair pair = pair_of(b);
      const int64_t other_begin = other.ragged.start[b], m = other.ragged.size(b);
      if (pair.upstream == 0.0f || m == 0) continue;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t j = other_begin + pair.own_match[i * pair.own_step];
        add_scaled(matched + i * kChunk, pair.upstream, other.row(j) + d, columns);
      }
      for (int64_t j = 0; j < m; ++j) {
        const int64_t i = pair.other_match[j * pair.other_step];
        const float scale = pair.upstream * other.ragged.weight[other_begin + j];
        add_scaled(gradient + i * own.stride + d, scale, other.row(other_begin + j) + d, columns);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      grad_weight[begin + i] += product(own.row(begin + i) + d, matched + i * kChunk, columns);
      add_scaled(gradient + i * own.stride + d, own.ragged.weight[begin + i], matched + i * kChunk, columns);
    }
  }
  // Through x / ||x||: only the part across the token's direction remains.
  for (int64_t i = 0; i < n; ++i) {
    const float* unit = own.row(begin + i);
    float* row = gradient + i * own.stride;
    const float along = product(unit, row, own.stride), inverse = own.inverse[begin + i];
    float* out = grad_tokens + (begin + i) * width;
    for (int64_t d = 0; d < width; ++d) out[d] = (row[d] - along * unit[d]) * inverse;
  }
}

int64_t scratch_of(const Units& units) {
  int64_t longest = 0;
  for (int64_t i = 0; i < units.ragged.count; ++i) longest = larger(longest, units.ragged.size(i));
  return longest * (kChunk + units.stride);
}

}  // namespace

void interaction_backward(const InteractionBackward& p) {
  const Units text(p.text), smiles(p.smiles);
  const int64_t scratch_size = larger(scratch_of(text), scratch_of(smiles));
  const Buffer<float> scratch_of_all(p.threads * scratch_size);
  const int64_t texts = p.text.count, molecules = p.smiles.count, smiles_tokens = p.smiles.total();

  for_each_task(texts + molecules, p.threads, [&](int64_t, int64_t i) {
    i < texts ? text.fill(i) : smiles.fill(i - texts);
  });
  for_each_task(texts + molecules, p.threads, [&](int64_t worker, int64_t index) {
    float* scratch = scratch_of_all.data() + worker * scratch_size;
    if (index < texts) {
      const int64_t a = index;
      const auto pair_of = [&](int64_t b) {
        return Pair{p.grad_scores[a * molecules + b] / 2, p.text_match + p.text.start[a] * molecules + b, molecules,
                    p.smiles_match + a * smiles_tokens + p.smiles.start[b], 1};
      };
      if (p.text.size(a) > 0) differentiate(text, a, smiles, pair_of, p.grad_text, p.grad_text_weight, scratch);
    } else {
      const int64_t b = index - texts;
      const auto pair_of = [&](int64_t a) {
        return Pair{p.grad_scores[a * molecules + b] / 2, p.smiles_match + a * smiles_tokens + p.smiles.start[b], 1,
                    p.text_match + p.text.start[a] * molecules + b, molecules};
      };
      if (p.smiles.size(b) > 0) differentiate(smiles, b, text, pair_of, p.grad_smiles, p.grad_smiles_weight, scratch);
    }
  });
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
