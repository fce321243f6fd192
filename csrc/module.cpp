// Python bindings. Tensors arrive as addresses of contiguous memory; the caller has checked shapes, dtypes and values.
// The interpreter lock is released while a kernel runs.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef ATOMAS_X86
#include <cpuid.h>
#endif
#ifdef ATOMAS_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

using namespace atomas;
using Address = std::uintptr_t;

struct Kernels {
  void (*interaction_forward)(const InteractionForward&);
  void (*interaction_backward)(const InteractionBackward&);
  void (*cluster)(const Clustering&);
  void (*merge_forward)(const MergeForward&);
  void (*merge_backward)(const MergeBackward&);
  void (*contrastive_forward)(const ContrastiveForward&);
  void (*contrastive_key_gradient)(const ContrastiveKeyGradient&);
  void (*attention_forward)(const AttentionForward&);
  void (*attention_backward)(const AttentionBackward&);
  void (*dropout)(const DropoutProblem&);
};

#define ATOMAS_KERNELS_OF(isa) ATOMAS_KERNELS_WITH(isa, isa)
// The interaction of one set, the others of another.
#define ATOMAS_KERNELS_WITH(interaction, isa)                                                                     \
  Kernels {                                                                                                       \
    interaction::interaction_forward, interaction::interaction_backward, isa::cluster, isa::merge_forward,        \
        isa::merge_backward, isa::contrastive_forward, isa::contrastive_key_gradient, isa::attention_forward,     \
        isa::attention_backward, isa::dropout                                                                     \
  }

#ifdef ATOMAS_HAS_AMX
// The operating system hands out the tile registers on request, to the whole process.
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool tiles_usable() {
  constexpr unsigned kSavesState = 1u << 27, kTileBfloat = 1u << 22, kTile = 1u << 24, kTileState = 3u << 17;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSavesState)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kTileBfloat)) return false;
  unsigned enabled, high;
  asm("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  return (enabled & kTileState) == kTileState && tiles_permitted();
}
#endif

std::vector<std::string> usable_sets() {
  std::vector<std::string> sets;
#ifdef ATOMAS_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("fma")) {
#ifdef ATOMAS_HAS_AMX
    if (tiles_usable()) sets.emplace_back("amx_bf16");
#endif
    sets.emplace_back("avx512");
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.emplace_back("avx2");
#endif
  sets.emplace_back("baseline");
  return sets;
}

// Sets that this processor and operating system can run, best first. Asked once: in a virtual machine CPUID takes
// microseconds.
const std::vector<std::string>& instruction_sets() {
  static const std::vector<std::string> sets = usable_sets();
  return sets;
}

Kernels kernels_of(const std::string& isa) {
  // Of use to tests alone.
  if (isa == "amx_emulated") return ATOMAS_KERNELS_WITH(amx_emulated, baseline);
  for (const std::string& runnable : instruction_sets()) {
    if (isa != runnable) continue;
#ifdef ATOMAS_HAS_AMX
    if (isa == "amx_bf16") return ATOMAS_KERNELS_WITH(amx_bf16, avx512);
#endif
#ifdef ATOMAS_X86
    if (isa == "avx512") return ATOMAS_KERNELS_OF(avx512);
    if (isa == "avx2") return ATOMAS_KERNELS_OF(avx2);
#endif
    return ATOMAS_KERNELS_OF(baseline);
  }
  throw std::invalid_argument("isa: this machine does not run " + isa);
}

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using Lengths = std::vector<std::int64_t>;

Lengths starts_of(const Lengths& lengths) {
  Lengths start(lengths.size() + 1, 0);
  for (std::size_t i = 0; i < lengths.size(); ++i) start[i + 1] = start[i] + lengths[i];
  return start;
}

Float float_of(const std::string& dtype) {
  if (dtype == "float32") return Float::single;
  if (dtype == "bfloat16") return Float::bfloat;
  if (dtype == "float16") return Float::half;
  throw std::invalid_argument("dtype: " + dtype);
}

struct Tokens {
  Address data;
  std::string dtype;
  Address weight;
  Lengths start;

  Tokens(const std::string& dtype, const Lengths& lengths, Address data, Address weight)
      : data(data), dtype(dtype), weight(weight), start(starts_of(lengths)) {}

  Ragged ragged(std::int64_t width) const {
    return {{at<const void>(data), float_of(dtype), start.back(), width, width},
            at<const float>(weight),
            start.data(),
            static_cast<std::int64_t>(start.size()) - 1};
  }
};

void interaction_forward(const std::string& isa, int threads, const std::string& dtype, std::int64_t width,
                         const Lengths& text_lengths, const Lengths& smiles_lengths, Address text, Address smiles,
                         Address text_weight, Address smiles_weight, Address scores, Address text_match,
                         Address smiles_match) {
  const Tokens texts(dtype, text_lengths, text, text_weight), molecules(dtype, smiles_lengths, smiles, smiles_weight);
  kernels_of(isa).interaction_forward({texts.ragged(width), molecules.ragged(width), at<float>(scores),
                                       at<std::int16_t>(text_match), at<std::int16_t>(smiles_match), threads});
}

void interaction_backward(const std::string& isa, int threads, const std::string& dtype, std::int64_t width,
                          const Lengths& text_lengths, const Lengths& smiles_lengths, Address text, Address smiles,
                          Address text_weight, Address smiles_weight, Address grad_scores, Address text_match,
                          Address smiles_match, Address grad_text, Address grad_smiles, Address grad_text_weight,
                          Address grad_smiles_weight) {
  const Tokens texts(dtype, text_lengths, text, text_weight), molecules(dtype, smiles_lengths, smiles, smiles_weight);
  kernels_of(isa).interaction_backward({texts.ragged(width), molecules.ragged(width), at<const float>(grad_scores),
                                        at<const std::int16_t>(text_match), at<const std::int16_t>(smiles_match),
                                        at<float>(grad_text), at<float>(grad_smiles), at<float>(grad_text_weight),
                                        at<float>(grad_smiles_weight), threads});
}

void cluster(const std::string& isa, int threads, std::int64_t width, std::int64_t neighbours, const Lengths& lengths,
             const Lengths& cluster_lengths, Address tokens, Address assignment) {
  const Kernels kernels = kernels_of(isa);
  const Lengths start = starts_of(lengths);
  kernels.cluster({at<const float>(tokens), start.data(), cluster_lengths.data(),
                   static_cast<std::int64_t>(lengths.size()), width, neighbours, at<std::int64_t>(assignment),
                   threads});
}

Merge merge(int threads, std::int64_t width, const Lengths& start, const Lengths& cluster_start, Address tokens,
            Address weight, Address assignment) {
  return {at<const float>(tokens),
          at<const float>(weight),
          at<const std::int64_t>(assignment),
          start.data(),
          cluster_start.data(),
          static_cast<std::int64_t>(start.size()) - 1,
          width,
          threads};
}

void merge_forward(const std::string& isa, int threads, std::int64_t width, const Lengths& lengths,
                   const Lengths& cluster_lengths, Address tokens, Address weight, Address assignment, Address merged,
                   Address weight_sum) {
  const Kernels kernels = kernels_of(isa);
  const Lengths start = starts_of(lengths), cluster_start = starts_of(cluster_lengths);
  kernels.merge_forward({merge(threads, width, start, cluster_start, tokens, weight, assignment), at<float>(merged),
                         at<float>(weight_sum)});
}

void merge_backward(const std::string& isa, int threads, std::int64_t width, const Lengths& lengths,
                    const Lengths& cluster_lengths, Address tokens, Address weight, Address assignment, Address merged,
                    Address weight_sum, Address grad_merged, Address grad_tokens, Address grad_weight) {
  const Kernels kernels = kernels_of(isa);
  const Lengths start = starts_of(lengths), cluster_start = starts_of(cluster_lengths);
  kernels.merge_backward({merge(threads, width, start, cluster_start, tokens, weight, assignment),
                          at<const float>(merged), at<const float>(weight_sum), at<const float>(grad_merged),
                          at<float>(grad_tokens), at<float>(grad_weight)});
}

// dtype, address, rows, numbers from one row to the next
using Rows = std::tuple<std::string, Address, std::int64_t, std::int64_t>;

Matrix matrix(const Rows& rows, std::int64_t width) {
  const auto& [dtype, data, count, stride] = rows;
  return {at<const void>(data), float_of(dtype), count, width, stride};
}

Contrastive contrastive(int threads, std::int64_t count, std::int64_t width, float alpha, float temperature,
                        const Rows& keys, const Rows& queue, Address query, Address momentum_query, Address positive,
                        Address ignore) {
  return {at<const float>(query),
          at<const float>(momentum_query),
          matrix(keys, width),
          matrix(queue, width),
          at<const std::int64_t>(positive),
          at<const bool>(ignore),
          count,
          width,
          temperature,
          alpha,
          threads};
}

// Queries lie side by side in a vector: eight and fewer leave half of one of AVX-512 empty.
std::string set_for_queries(const std::string& isa, std::int64_t count) {
  return count <= 8 && (isa == "avx512" || isa == "amx_bf16") ? "avx2" : isa;
}

void contrastive_forward(const std::string& isa, int threads, std::int64_t count, std::int64_t width, float alpha,
                         float temperature, const Rows& keys, const Rows& queue, Address query, Address momentum_query,
                         Address positive, Address ignore, Address loss, Address normalizer, Address grad_query,
                         Address grad_temperature) {
  const Contrastive problem = contrastive(threads, count, width, alpha, temperature, keys, queue, query,
                                          momentum_query, positive, ignore);
  kernels_of(set_for_queries(isa, count)).contrastive_forward(
      {problem, at<float>(loss), at<float>(normalizer), at<float>(grad_query), at<float>(grad_temperature)});
}

void contrastive_key_gradient(const std::string& isa, int threads, std::int64_t count, std::int64_t width, float alpha,
                              float temperature, const Rows& keys, const Rows& queue, Address query,
                              Address momentum_query, Address positive, Address ignore, Address normalizer,
                              Address grad_keys) {
  const Contrastive problem = contrastive(threads, count, width, alpha, temperature, keys, queue, query,
                                          momentum_query, positive, ignore);
  kernels_of(set_for_queries(isa, count))
      .contrastive_key_gradient({problem, at<const float>(normalizer), at<float>(grad_keys)});
}

// address, numbers from one row to the next
using HeadRowsAt = std::tuple<Address, std::int64_t>;

HeadRows head_rows(const HeadRowsAt& rows) { return {at<const float>(std::get<0>(rows)), std::get<1>(rows)}; }

// heads, width of one, reach of the distance bias, causal
using AttentionShape = std::tuple<std::int64_t, std::int64_t, std::int64_t, bool>;
// seed, threshold, scale
using DropoutRule = std::tuple<std::uint64_t, std::uint32_t, float>;

Attention attention(int threads, const AttentionShape& shape, const DropoutRule& dropout, const Lengths& query_start,
                    const Lengths& key_start, const HeadRowsAt& query, const HeadRowsAt& key, const HeadRowsAt& value,
                    Address distance_bias, Address key_bias) {
  const auto& [heads, width, reach, causal] = shape;
  const auto& [seed, threshold, scale] = dropout;
  return {head_rows(query),
          head_rows(key),
          head_rows(value),
          query_start.data(),
          key_start.data(),
          static_cast<std::int64_t>(query_start.size()) - 1,
          heads,
          width,
          at<const float>(distance_bias),
          reach,
          at<const float>(key_bias),
          causal,
          seed,
          threshold,
          scale,
          threads};
}

void attention_forward(const std::string& isa, int threads, const AttentionShape& shape, const DropoutRule& dropout,
                       const Lengths& query_lengths, const Lengths& key_lengths, const HeadRowsAt& query,
                       const HeadRowsAt& key, const HeadRowsAt& value, Address distance_bias, Address key_bias,
                       Address output, Address normalizer) {
  const Lengths query_start = starts_of(query_lengths), key_start = starts_of(key_lengths);
  kernels_of(isa).attention_forward(
      {attention(threads, shape, dropout, query_start, key_start, query, key, value, distance_bias, key_bias),
       at<float>(output), at<float>(normalizer)});
}

void attention_backward(const std::string& isa, int threads, const AttentionShape& shape, const DropoutRule& dropout,
                        const Lengths& query_lengths, const Lengths& key_lengths, const HeadRowsAt& query,
                        const HeadRowsAt& key, const HeadRowsAt& value, Address distance_bias, Address key_bias,
                        const HeadRowsAt& output, const HeadRowsAt& grad_output, Address normalizer,
                        Address grad_query, Address grad_key, Address grad_value, Address grad_distance_bias,
                        Address grad_key_bias) {
  const Lengths query_start = starts_of(query_lengths), key_start = starts_of(key_lengths);
  kernels_of(isa).attention_backward(
      {attention(threads, shape, dropout, query_start, key_start, query, key, value, distance_bias, key_bias),
       head_rows(output), head_rows(grad_output), at<const float>(normalizer), at<float>(grad_query),
       at<float>(grad_key), at<float>(grad_value), at<float>(grad_distance_bias), at<float>(grad_key_bias)});
}

void dropout(const std::string& isa, int threads, const DropoutRule& rule, std::int64_t count, Address input,
             Address output) {
  const auto& [seed, threshold, scale] = rule;
  kernels_of(isa).dropout({at<const float>(input), at<float>(output), count, seed, threshold, scale, threads});
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.doc() = "CPU kernels of atomas_kernels over raw pointers; use the operators of atomas_kernels instead.";
  module.def("instruction_sets", &instruction_sets, "Instruction sets that this machine runs, best first.");
  module.def("interaction_forward", &interaction_forward, unlocked);
  module.def("interaction_backward", &interaction_backward, unlocked);
  module.def("cluster", &cluster, unlocked);
  module.def("merge_forward", &merge_forward, unlocked);
  module.def("merge_backward", &merge_backward, unlocked);
  module.def("contrastive_forward", &contrastive_forward, unlocked);
  module.def("contrastive_key_gradient", &contrastive_key_gradient, unlocked);
  module.def("attention_forward", &attention_forward, unlocked);
  module.def("attention_backward", &attention_backward, unlocked);
  module.def("dropout", &dropout, unlocked);
}
