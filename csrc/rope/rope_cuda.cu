#include "../device.cuh"
#include "rope.h"

namespace megalite {
namespace {

// One block per token, so that its row of the tables is read from memory once. Threads iterate over (head, slot), with
// one slot for each rotated pair and each copied feature.
template <class T, class A>
__global__ void rope_kernel(const T* x, const A* cos, const A* sin, T* y, RopeShape s, A direction) {
  const int64_t token = blockIdx.x, b = token / s.seq, t = token % s.seq;
  const int64_t table = b * s.table_stride_batch + t * s.half;
  const int64_t slots = s.head_dim - s.half, heads = s.groups * s.per_group;
  for (int64_t at = threadIdx.x; at < heads * slots; at += blockDim.x) {
    const int64_t head = at / slots, i = at % slots;
    const T* in = x + b * s.stride_batch + t * s.stride_seq + head / s.per_group * s.stride_group +
                  head % s.per_group * s.stride_head;
    T* out = y + (token * heads + head) * s.head_dim;
    if (i < s.half) {
      const A first = widen(in[i]), second = widen(in[i + s.half]);
      const A c = cos[table + i], d = sin[table + i] * direction;
      out[i] = narrow<T, A>(first * c - second * d);
      out[i + s.half] = narrow<T, A>(second * c + first * d);
    } else {
      out[i + s.half] = in[i + s.half];
    }
  }
}

}  // namespace
}  // namespace megalite

cudaError_t megalite_rope_cuda(MegaliteDType dtype, const void* x, const void* cos, const void* sin, void* y,
                               RopeShape shape, bool inverse, cudaStream_t stream) {
  using namespace megalite;
  return dispatch(dtype, [&](auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    using A = typename Accumulate<T>::type;
    rope_kernel<T, A><<<shape.batch * shape.seq, 256, 0, stream>>>(static_cast<const T*>(x), static_cast<const A*>(cos),
                                                                   static_cast<const A*>(sin), static_cast<T*>(y),
                                                                   shape, inverse ? A(-1) : A(1));
  });
}
