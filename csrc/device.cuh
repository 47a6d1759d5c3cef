#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "dtype.h"

// Shared by the CUDA kernels: element types, block-wide reductions, and the choice of a template by dtype.
namespace megalite {

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T, class A>
__device__ inline T narrow(A x) {
  return static_cast<T>(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}

struct Larger {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return b > a ? b : a;
  }
};
struct Plus {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};

// Returns the same result in every thread of the block; blockDim.x is a multiple of the warp size. The order of
// additions depends on blockDim alone, so results are bitwise reproducible.
template <class A, class Op>
__device__ A block_reduce(A value, A identity, Op op) {
  __shared__ A per_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int step = 16; step > 0; step /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, step));
  __syncthreads();  // the previous reduction may still be reading the array
  if (lane == 0) per_warp[warp] = value;
  __syncthreads();
  value = lane < warps ? per_warp[lane] : identity;
  for (int step = 16; step > 0; step /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// Calls launch with a null pointer of the element type; returns cudaErrorInvalidValue for an unknown dtype.
template <class Launch>
cudaError_t dispatch(MegaliteDType dtype, Launch launch) {
  switch (dtype) {
    case kFloat32:
      launch(static_cast<float*>(nullptr));
      break;
    case kFloat64:
      launch(static_cast<double*>(nullptr));
      break;
    case kBFloat16:
      launch(static_cast<__nv_bfloat16*>(nullptr));
      break;
    case kFloat16:
      launch(static_cast<__half*>(nullptr));
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <class P>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};

}  // namespace megalite
