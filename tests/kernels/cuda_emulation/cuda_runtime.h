// Runs CUDA kernels on the CPU for the tests: the sources are compiled as C++ with this header in place of CUDA's.
//
// Blocks run one after another. The threads of a block are fibres that run in turn from one __syncthreads() to the
// next, forwards or (atomas_emulation_order) backwards: a kernel that lacks a barrier gives two different results.
// Threads that part ways at a barrier are an error. Shared memory holds what the block before left.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;
constexpr cudaError_t cudaErrorLaunchFailure = 719;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return "threads of one block stand at different barriers";
  }
  return "unknown error";
}

extern "C" {
__attribute__((visibility("default"))) inline int atomas_emulation_order = 1;
}

namespace emulation {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kMostThreads = 1024;

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
};

inline std::vector<Fibre> fibres(kMostThreads);
inline ucontext_t scheduler;
inline Fibre* current;
inline std::function<void()> body;

inline void enter() {
  body();
  current->done = true;
}

inline void resume(unsigned thread) {
  threadIdx = dim3(thread, 0, 0);
  current = &fibres[thread];
  swapcontext(&scheduler, &current->context);
}

// Runs one block; false if some threads end while others wait.
inline bool run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[i];
    fibre.done = false;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = &scheduler;
    makecontext(&fibre.context, enter, 0);
  }
  while (!fibres[0].done) {
    for (unsigned i = 0; i < threads; ++i) resume(atomas_emulation_order > 0 ? i : threads - 1 - i);
    for (unsigned i = 1; i < threads; ++i) {
      if (fibres[i].done != fibres[0].done) return false;
    }
  }
  return true;
}

}  // namespace emulation

inline void __syncthreads() { swapcontext(&emulation::current->context, &emulation::scheduler); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (blockDim.x == 0 || blockDim.x > emulation::kMostThreads || gridDim.x == 0 || gridDim.y == 0 ||
      gridDim.y > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  emulation::body = [=] { kernel(arguments...); };
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = dim3(x, y, 0);
      if (!emulation::run_block(blockDim.x)) return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}
