// Problems of the CPU kernels and their entry points, one set per instruction set.
//
// Everything is a raw pointer to contiguous memory; nothing here knows of torch. Sequences are ragged: token rows of
// sequence i are [start[i], start[i + 1]).
#pragma once

#include <cstdint>

namespace atomas {

struct Ragged {
  const float* tokens;   // [start[count], width]
  const float* weight;   // [start[count]]
  const int64_t* start;  // [count + 1]
  int64_t count;
  int64_t width;

  int64_t total() const { return start[count]; }
  int64_t size(int64_t i) const { return start[i + 1] - start[i]; }
};

// Weighted token interaction (method.md 3.2). `text_match[b, t]` is the token of SMILES b that is most similar to text
// token t, `smiles_match[a, s]` the token of text a most similar to SMILES token s, both counted from the sequence's start.
struct InteractionForward {
  Ragged text, smiles;
  float* scores;          // [text.count, smiles.count]
  int16_t* text_match;    // [smiles.count, text.total()] or null
  int16_t* smiles_match;  // [text.count, smiles.total()] or null
  int threads;
};

struct InteractionBackward {
  Ragged text, smiles;
  const float* grad_scores;
  const int16_t* text_match;
  const int16_t* smiles_match;
  float* grad_text;
  float* grad_smiles;
  float* grad_text_weight;
  float* grad_smiles_weight;
  int threads;
};

// Density-peak clustering (method.md 3.1, step 2).
struct Clustering {
  const float* tokens;
  const int64_t* start;           // [count + 1]
  const int64_t* cluster_counts;  // [count], 1 <= clusters <= tokens, or 0 for an empty sequence
  int64_t count;
  int64_t width;
  int64_t neighbours;
  int64_t* assignment;  // [start[count]]
  int threads;
};

// Weighted mean of the members of each cluster (method.md 3.1, step 3).
struct Merge {
  const float* tokens;
  const float* weight;
  const int64_t* assignment;
  const int64_t* start;          // [count + 1], tokens
  const int64_t* cluster_start;  // [count + 1], clusters
  int64_t count;
  int64_t width;
  int threads;
};

struct MergeForward : Merge {
  float* merged;      // [cluster_start[count], width]
  float* weight_sum;  // [cluster_start[count]], with the floor of the denominator added
};

struct MergeBackward : Merge {
  const float* merged;
  const float* weight_sum;
  const float* grad_merged;
  float* grad_tokens;
  float* grad_weight;
};

#define ATOMAS_DECLARE_KERNELS(isa)                    \
  namespace isa {                                      \
  void interaction_forward(const InteractionForward&); \
  void interaction_backward(const InteractionBackward&); \
  void cluster(const Clustering&);                     \
  void merge_forward(const MergeForward&);             \
  void merge_backward(const MergeBackward&);           \
  }

ATOMAS_DECLARE_KERNELS(baseline)
ATOMAS_DECLARE_KERNELS(avx2)
ATOMAS_DECLARE_KERNELS(avx512)

}  // namespace atomas
