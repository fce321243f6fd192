// Python bindings. Tensors arrive as addresses of contiguous memory; the caller has checked shapes, dtypes and values.
// The interpreter lock is released while a kernel runs.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
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
};

#define ATOMAS_KERNELS_OF(isa) \
  Kernels { isa::interaction_forward, isa::interaction_backward, isa::cluster, isa::merge_forward, isa::merge_backward }

// Sets that this processor and operating system can run, best first.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> sets;
#ifdef ATOMAS_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("fma")) sets.emplace_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.emplace_back("avx2");
#endif
  sets.emplace_back("baseline");
  return sets;
}

Kernels kernels_of(const std::string& isa) {
  for (const std::string& runnable : instruction_sets()) {
    if (isa != runnable) continue;
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

std::vector<std::int64_t> starts_of(const std::vector<std::int64_t>& lengths) {
  std::vector<std::int64_t> start(lengths.size() + 1, 0);
  for (std::size_t i = 0; i < lengths.size(); ++i) start[i + 1] = start[i] + lengths[i];
  return start;
}

using Lengths = std::vector<std::int64_t>;

Ragged ragged(Address tokens, Address weight, const Lengths& start, std::int64_t width) {
  return {at<const float>(tokens), at<const float>(weight), start.data(), static_cast<std::int64_t>(start.size()) - 1,
          width};
}

void interaction_forward(const std::string& isa, int threads, std::int64_t width, const Lengths& text_lengths,
                         const Lengths& smiles_lengths, Address text, Address smiles, Address text_weight,
                         Address smiles_weight, Address scores, Address text_match, Address smiles_match) {
  const Kernels kernels = kernels_of(isa);
  const Lengths text_start = starts_of(text_lengths), smiles_start = starts_of(smiles_lengths);
  kernels.interaction_forward({ragged(text, text_weight, text_start, width),
                               ragged(smiles, smiles_weight, smiles_start, width), at<float>(scores),
                               at<std::int16_t>(text_match), at<std::int16_t>(smiles_match), threads});
}

void interaction_backward(const std::string& isa, int threads, std::int64_t width, const Lengths& text_lengths,
                          const Lengths& smiles_lengths, Address text, Address smiles, Address text_weight,
                          Address smiles_weight, Address grad_scores, Address text_match, Address smiles_match,
                          Address grad_text, Address grad_smiles, Address grad_text_weight,
                          Address grad_smiles_weight) {
  const Kernels kernels = kernels_of(isa);
  const Lengths text_start = starts_of(text_lengths), smiles_start = starts_of(smiles_lengths);
  kernels.interaction_backward({ragged(text, text_weight, text_start, width),
                                ragged(smiles, smiles_weight, smiles_start, width), at<const float>(grad_scores),
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
}
