// Problems of the CPU kernels and their entry points, one set per instruction set.
//
// Everything is a raw pointer to contiguous memory; nothing here knows of torch. Sequences are ragged: token rows of
// sequence i are [start[i], start[i + 1]).
#pragma once

#include <cstdint>

// Inline in every source: were one copy kept, it could be the one compiled for AVX-512.
#define ATOMAS_INLINE __attribute__((always_inline)) inline

namespace atomas {

enum class Float { single, bfloat, half };

// Rows of floating numbers, `stride` numbers apart.
struct Matrix {
  const void* data;
  Float type;
  int64_t rows;
  int64_t width;
  int64_t stride;
};

struct Ragged {
  Matrix tokens;         // [start[count], width], contiguous
  const float* weight;   // [start[count]]
  const int64_t* start;  // [count + 1]
  int64_t count;

  ATOMAS_INLINE int64_t width() const { return tokens.width; }
  ATOMAS_INLINE int64_t total() const { return start[count]; }
  ATOMAS_INLINE int64_t size(int64_t i) const { return start[i + 1] - start[i]; }
};

// Weighted token interaction (method.md 3.2). `text_match[b, t]` is the token of SMILES b that is most similar to text
// token t, `smiles_match[a, s]` the token of text a most similar to SMILES token s, both counted from the sequence's start.
struct InteractionForward {
  Ragged text, smiles;
  float* scores;          // [text.count, smiles.count] or null
  int16_t* text_match;    // [smiles.count, text.total()] or null
  int16_t* smiles_match;  // [text.count, smiles.total()] or null
  int threads;
};

// Without matches they are found again, for some texts at a time: memory linear in the tokens.
struct InteractionBackward {
  Ragged text, smiles;
  const float* grad_scores;
  const int16_t* text_match;    // or null, then
  const int16_t* smiles_match;  // this one too
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

// Soft-target cross entropy of queries against keys and then a queue (method.md 2), all divided by `temperature`.
// Logarithms of the denominators are kept for the keys' gradient.
struct Contrastive {
  const float* query;           // [count, width]
  const float* momentum_query;  // [count, width]
  Matrix keys, queue;
  const int64_t* positive;  // [count], row of `keys`
  const bool* ignore;       // [count, keys.rows + queue.rows] or null
  int64_t count;
  int64_t width;
  float temperature;
  float alpha;
  int threads;
};

struct ContrastiveForward : Contrastive {
  float* loss;              // [1], mean over the queries
  float* normalizer;        // [2, count], logarithms: of the query's softmax, of the momentum query's
  float* grad_query;        // [count, width], or null with
  float* grad_temperature;  // [1]
};

struct ContrastiveKeyGradient : Contrastive {
  const float* normalizer;
  float* grad_keys;  // [keys.rows, width]
};

// Rows of all heads, [heads * width] each, `stride` numbers apart.
struct HeadRows {
  const float* data;
  int64_t stride;
};

// T5 attention over packed sequences: logits are query . key + distance_bias + key_bias.
struct Attention {
  HeadRows query, key, value;
  const int64_t* query_start;  // [count + 1]
  const int64_t* key_start;    // [count + 1]
  int64_t count;
  int64_t heads;
  int64_t width;
  const float* distance_bias;  // [heads, 2 reach + 1] for key - query, or null
  int64_t reach;
  const float* key_bias;  // [key_start[count]] or null
  bool causal;
  uint64_t seed;
  uint32_t threshold;  // a weight is dropped with probability threshold / 2^32
  float scale;         // of those that are kept
  int threads;
};

struct AttentionForward : Attention {
  float* output;      // [query_start[count], heads, width]
  float* normalizer;  // [query_start[count], heads], logarithms of the denominators
};

struct AttentionBackward : Attention {
  HeadRows output, grad_output;
  const float* normalizer;
  float* grad_query;          // [query_start[count], heads, width]
  float* grad_key;            // [key_start[count], heads, width]
  float* grad_value;          // [key_start[count], heads, width]
  float* grad_distance_bias;  // [heads, 2 reach + 1] or null
  float* grad_key_bias;       // [key_start[count], heads], to be summed over the heads, or null
};

struct DropoutProblem {
  const float* input;  // [count]
  float* output;       // [count]
  int64_t count;
  uint64_t seed;
  uint32_t threshold;  // a value is dropped with probability threshold / 2^32
  float scale;         // of those that are kept
  int threads;
};

#define ATOMAS_DECLARE_INTERACTION(isa)                \
  namespace isa {                                      \
  void interaction_forward(const InteractionForward&); \
  void interaction_backward(const InteractionBackward&); \
  }

#define ATOMAS_DECLARE_KERNELS(isa)                           \
  ATOMAS_DECLARE_INTERACTION(isa)                             \
  namespace isa {                                             \
  void cluster(const Clustering&);                            \
  void merge_forward(const MergeForward&);                    \
  void merge_backward(const MergeBackward&);                  \
  void contrastive_forward(const ContrastiveForward&);        \
  void contrastive_key_gradient(const ContrastiveKeyGradient&); \
  void attention_forward(const AttentionForward&);            \
  void attention_backward(const AttentionBackward&);          \
  void dropout(const DropoutProblem&);                        \
  }

ATOMAS_DECLARE_KERNELS(baseline)
ATOMAS_DECLARE_KERNELS(avx2)
ATOMAS_DECLARE_KERNELS(avx512)
// AVX-512 with tiles for bfloat16 tokens; and the same in plain code, which runs the tiles' logic on every machine.
ATOMAS_DECLARE_INTERACTION(amx_bf16)
ATOMAS_DECLARE_INTERACTION(amx_emulated)

}  // namespace atomas
