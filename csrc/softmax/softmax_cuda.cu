#include <math_constants.h>

#include "../device.cuh"
#include "softmax.h"

namespace megalite {
namespace {

__device__ int64_t row_offset(const ScoreShape& s, int64_t row) {
  const int64_t query = row % s.queries, head = row / s.queries % s.heads, batch = row / s.queries / s.heads;
  return batch * s.stride_batch + head * s.stride_head + query * s.stride_query;
}

__device__ int64_t visible_keys(const ScoreShape& s, int64_t row) { return row % s.queries + 1 + s.keys - s.queries; }

// One block per row. A row is a few KiB, so its second and third reads hit the caches.
template <class T, class A>
__global__ void forward_kernel(const T* scores, T* probs, ScoreShape s, A scale) {
  const int64_t row = blockIdx.x, visible = visible_keys(s, row);
  const T* x = scores + row_offset(s, row);
  T* y = probs + row * s.keys;
  const A lowest = -static_cast<A>(CUDART_INF);
  A peak = lowest;
  for (int64_t j = threadIdx.x; j < visible; j += blockDim.x) peak = Larger()(peak, widen(x[j]) * scale);
  peak = block_reduce(peak, lowest, Larger());
  // all -inf (or NaN): subtracting 0 yields zeros (or NaN), while -inf - -inf would yield NaN
  if (peak == lowest) peak = 0;
  A sum = 0;
  for (int64_t j = threadIdx.x; j < visible; j += blockDim.x) sum += exp(widen(x[j]) * scale - peak);
  sum = block_reduce(sum, A(0), Plus());
  const A inverse = sum == 0 ? A(0) : 1 / sum;
  for (int64_t j = threadIdx.x; j < s.keys; j += blockDim.x) {
    y[j] = narrow<T, A>(j < visible ? exp(widen(x[j]) * scale - peak) * inverse : A(0));
  }
}

template <class T, class A>
__global__ void backward_kernel(const T* grad, const T* probs, T* out, ScoreShape s, A scale) {
  const int64_t row = blockIdx.x, visible = visible_keys(s, row);
  const T* g = grad + row_offset(s, row);
  const T* p = probs + row * s.keys;
  A dot = 0;
  for (int64_t j = threadIdx.x; j < visible; j += blockDim.x) dot += widen(g[j]) * widen(p[j]);
  dot = block_reduce(dot, A(0), Plus());
  for (int64_t j = threadIdx.x; j < s.keys; j += blockDim.x) {
    out[row * s.keys + j] = narrow<T, A>(j < visible ? scale * widen(p[j]) * (widen(g[j]) - dot) : A(0));
  }
}

int64_t rows(const ScoreShape& s) { return s.batch * s.heads * s.queries; }

int threads(const ScoreShape& s) { return s.keys <= 128 ? 32 : s.keys <= 1024 ? 128 : 256; }

}  // namespace
}  // namespace megalite

cudaError_t megalite_softmax_forward_cuda(MegaliteDType dtype, const void* scores, void* probs, ScoreShape shape,
                                          double scale, cudaStream_t stream) {
  using namespace megalite;
  return dispatch(dtype, [&](auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    using A = typename Accumulate<T>::type;
    forward_kernel<T, A><<<rows(shape), threads(shape), 0, stream>>>(
        static_cast<const T*>(scores), static_cast<T*>(probs), shape, static_cast<A>(scale));
  });
}

cudaError_t megalite_softmax_backward_cuda(MegaliteDType dtype, const void* grad, const void* probs, void* grad_scores,
                                           ScoreShape shape, double scale, cudaStream_t stream) {
  using namespace megalite;
  return dispatch(dtype, [&](auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    using A = typename Accumulate<T>::type;
    backward_kernel<T, A>
        <<<rows(shape), threads(shape), 0, stream>>>(static_cast<const T*>(grad), static_cast<const T*>(probs),
                                                     static_cast<T*>(grad_scores), shape, static_cast<A>(scale));
  });
}
