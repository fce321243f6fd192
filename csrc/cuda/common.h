// What the CUDA operators share.
//
// Every operator is a function with C linkage that takes raw pointers, a device number and a stream, queues its kernels
// and returns a cudaError_t: the library needs no headers of torch and fits every version of it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define ATOMAS_OPERATOR extern "C" __attribute__((visibility("default")))

namespace atomas {

enum class Dtype : uint8_t { kFloat32, kBfloat16, kFloat16 };

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

// Calls `function` with the tokens as what they are.
template <typename Function>
cudaError_t with_dtype(Dtype dtype, const void* tokens, Function function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(static_cast<const float*>(tokens));
    case Dtype::kBfloat16:
      return function(static_cast<const __nv_bfloat16*>(tokens));
    case Dtype::kFloat16:
      return function(static_cast<const __half*>(tokens));
  }
  return cudaErrorInvalidValue;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace atomas
