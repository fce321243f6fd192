// Merging of clusters (method.md 3.1, step 3) and its gradient, without atomics: the members of a cluster are added up
// in their order.

#include "common.h"

namespace atomas {
namespace {

constexpr int kThreads = 128;
constexpr float kWeightFloor = 1e-6f;

struct Clusters {
  const int64_t* ends;          // [count], running sum of the sequences' lengths
  const int64_t* cluster_ends;  // [count], running sum of their numbers of clusters
  const int64_t* assignment;    // of each token, within its sequence
  int64_t count;
  int64_t width;
};

// The sequence that item `index` belongs to: the first whose end lies behind it.
__device__ int64_t sequence_of(int64_t index, const int64_t* ends, int64_t count) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ends[middle] > index) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

__device__ int64_t start_of(int64_t sequence, const int64_t* ends) { return sequence > 0 ? ends[sequence - 1] : 0; }

// One block per cluster and `kThreads` features.
template <typename Token>
__global__ void __launch_bounds__(kThreads)
    merge(Clusters clusters, const Token* tokens, const float* weight, float* merged, float* weight_sum) {
  const int64_t cluster = blockIdx.x;
  const int64_t feature = blockIdx.y * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (feature >= clusters.width) return;
  const int64_t sequence = sequence_of(cluster, clusters.cluster_ends, clusters.count);
  const int64_t label = cluster - start_of(sequence, clusters.cluster_ends);
  float sum = 0.0f, total = 0.0f;
  for (int64_t token = start_of(sequence, clusters.ends); token < clusters.ends[sequence]; ++token) {
    if (clusters.assignment[token] != label) continue;
    sum = fmaf(weight[token], to_float(tokens[token * clusters.width + feature]), sum);
    total += weight[token];
  }
  merged[cluster * clusters.width + feature] = sum / (total + kWeightFloor);
  if (feature == 0) weight_sum[cluster] = total + kWeightFloor;
}

// One block per token: with W the weight of its cluster, dx = w / W dm and dw = <x - m, dm> / W.
template <typename Token>
__global__ void __launch_bounds__(kThreads)
    merge_gradient(Clusters clusters, const Token* tokens, const float* weight, const float* merged,
                   const float* weight_sum, const float* grad_merged, float* grad_tokens, float* grad_weight) {
  __shared__ float partial[kThreads];
  const int64_t token = blockIdx.x;
  const int64_t sequence = sequence_of(token, clusters.ends, clusters.count);
  const int64_t cluster = start_of(sequence, clusters.cluster_ends) + clusters.assignment[token];
  const float share = weight[token] / weight_sum[cluster];
  float sum = 0.0f;
  for (int64_t feature = threadIdx.x; feature < clusters.width; feature += kThreads) {
    const int64_t of_token = token * clusters.width + feature, of_cluster = cluster * clusters.width + feature;
    const float upstream = grad_merged[of_cluster];
    grad_tokens[of_token] = share * upstream;
    sum = fmaf(to_float(tokens[of_token]) - merged[of_cluster], upstream, sum);
  }
  partial[threadIdx.x] = sum;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) grad_weight[token] = partial[0] / weight_sum[cluster];
}

template <typename Token>
cudaError_t launch_merge(const Clusters& clusters, int64_t total, const Token* tokens, const float* weight,
                         float* merged, float* weight_sum, void* stream) {
  const dim3 grid(static_cast<unsigned>(total), static_cast<unsigned>((clusters.width + kThreads - 1) / kThreads));
  return launch(merge<Token>, grid, kThreads, stream, clusters, tokens, weight, merged, weight_sum);
}

template <typename Token>
cudaError_t launch_gradient(const Clusters& clusters, int64_t total, const Token* tokens, const float* weight,
                            const float* merged, const float* weight_sum, const float* grad_merged,
                            float* grad_tokens, float* grad_weight, void* stream) {
  return launch(merge_gradient<Token>, dim3(static_cast<unsigned>(total)), kThreads, stream, clusters, tokens, weight,
                merged, weight_sum, grad_merged, grad_tokens, grad_weight);
}

}  // namespace
}  // namespace atomas

// Merged tokens [total, width] and the denominators [total] of the `total` clusters of `count` sequences.
ATOMAS_OPERATOR int atomas_cluster_merge(int device, void* stream, atomas::Dtype dtype, const int64_t* ends,
                                         const int64_t* cluster_ends, const int64_t* assignment, int64_t count,
                                         int64_t width, int64_t total, const void* tokens, const float* weight,
                                         float* merged, float* weight_sum) {
  using namespace atomas;
  const Clusters clusters = {ends, cluster_ends, assignment, count, width};
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  return with_dtype(dtype, tokens, [&](auto* typed) {
    return launch_merge(clusters, total, typed, weight, merged, weight_sum, stream);
  });
}

// Gradients of the `total` tokens and their weights from that of the merged tokens.
ATOMAS_OPERATOR int atomas_cluster_merge_gradient(int device, void* stream, atomas::Dtype dtype, const int64_t* ends,
                                                  const int64_t* cluster_ends, const int64_t* assignment,
                                                  int64_t count, int64_t width, int64_t total, const void* tokens,
                                                  const float* weight, const float* merged, const float* weight_sum,
                                                  const float* grad_merged, float* grad_tokens, float* grad_weight) {
  using namespace atomas;
  const Clusters clusters = {ends, cluster_ends, assignment, count, width};
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  return with_dtype(dtype, tokens, [&](auto* typed) {
    return launch_gradient(clusters, total, typed, weight, merged, weight_sum, grad_merged, grad_tokens, grad_weight,
                           stream);
  });
}
