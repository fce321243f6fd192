// Momentum update (method.md 2) of many tensors with few launches: their addresses travel in the kernel's arguments.

#include "common.h"

namespace atomas {
namespace {

constexpr int kTensors = 128;  // per launch; the arguments stay below the 4 KiB that every toolkit allows
constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // loads of a thread that do not wait for one another
constexpr int64_t kChunk = 16 * kInFlight * kThreads;

struct Pairs {
  float* target[kTensors];
  const void* source[kTensors];
  int64_t size[kTensors];
  int first_block[kTensors + 1];  // of each tensor; the last is the size of the grid
  Dtype dtype[kTensors];          // of the sources
};
static_assert(sizeof(Pairs) + sizeof(float) <= 4096, "kernel arguments");

// target + weight * (source - target), from the nearer end and with one rounding of the product: what torch.lerp
// computes.
__device__ float interpolate(float target, float source, float weight) {
  const float way = source - target;
  return weight < 0.5f ? fmaf(weight, way, target) : fmaf(weight - 1.0f, way, source);
}

template <typename Source>
__device__ void update(float* target, const Source* source, int64_t begin, int64_t end, float weight) {
  for (int64_t start = begin + threadIdx.x; start < end; start += kInFlight * kThreads) {
    float old[kInFlight], now[kInFlight];
#pragma unroll
    for (int part = 0; part < kInFlight; ++part) {
      const int64_t i = start + part * kThreads;
      old[part] = i < end ? target[i] : 0.0f;
      now[part] = i < end ? to_float(source[i]) : 0.0f;
    }
#pragma unroll
    for (int part = 0; part < kInFlight; ++part) {
      const int64_t i = start + part * kThreads;
      if (i < end) target[i] = interpolate(old[part], now[part], weight);
    }
  }
}

__global__ void __launch_bounds__(kThreads) momentum_update(const __grid_constant__ Pairs pairs, float weight) {
  const int block = static_cast<int>(blockIdx.x);
  int tensor = 0, beyond = kTensors;
  while (beyond - tensor > 1) {
    const int middle = (tensor + beyond) / 2;
    (pairs.first_block[middle] <= block ? tensor : beyond) = middle;
  }
  const int64_t begin = (block - pairs.first_block[tensor]) * kChunk;
  const int64_t end = begin + kChunk < pairs.size[tensor] ? begin + kChunk : pairs.size[tensor];
  float* target = pairs.target[tensor];
  const void* source = pairs.source[tensor];
  switch (pairs.dtype[tensor]) {
    case Dtype::kFloat32:
      return update(target, static_cast<const float*>(source), begin, end, weight);
    case Dtype::kBfloat16:
      return update(target, static_cast<const __nv_bfloat16*>(source), begin, end, weight);
    case Dtype::kFloat16:
      return update(target, static_cast<const __half*>(source), begin, end, weight);
  }
}

}  // namespace
}  // namespace atomas

// In place: target[i] <- target[i] + weight * (source[i] - target[i]) for each of `count` tensors. The arrays are on
// the host, what they point to on the device.
ATOMAS_OPERATOR int atomas_momentum_update(int device, void* stream, int64_t count, float* const* targets,
                                           const void* const* sources, const int64_t* sizes,
                                           const atomas::Dtype* dtypes, float weight) {
  using namespace atomas;
  cudaError_t status = cudaSetDevice(device);
  for (int64_t start = 0; start < count && status == cudaSuccess; start += kTensors) {
    Pairs pairs = {};
    int blocks = 0;
    for (int place = 0; place < kTensors; ++place) {
      pairs.first_block[place] = blocks;
      if (start + place >= count) continue;
      pairs.target[place] = targets[start + place];
      pairs.source[place] = sources[start + place];
      pairs.size[place] = sizes[start + place];
      pairs.dtype[place] = dtypes[start + place];
      blocks += static_cast<int>((pairs.size[place] + kChunk - 1) / kChunk);
    }
    pairs.first_block[kTensors] = blocks;
    if (blocks > 0) {
      status = launch(momentum_update, dim3(static_cast<unsigned>(blocks)), kThreads, stream, pairs, weight);
    }
  }
  return status;
}
