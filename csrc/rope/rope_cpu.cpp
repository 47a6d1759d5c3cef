#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "../simd.h"
#include "rope.h"

namespace megalite {
namespace {

template <class T, class A>
MEGALITE_INLINE void rotate_head(const T* x, const A* cos, const A* sin, T* y, int64_t half, int64_t head_dim,
                                 A direction) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const A first = widen(x[i]), second = widen(x[i + half]), c = cos[i], s = sin[i] * direction;
    y[i] = narrow<T, A>(first * c - second * s);
    y[i + half] = narrow<T, A>(second * c + first * s);
  }
  std::memcpy(y + 2 * half, x + 2 * half, (head_dim - 2 * half) * sizeof(T));
}

template <class T, class A>
MEGALITE_INLINE void rotate_tokens(const T* x, const A* cos, const A* sin, T* y, const RopeShape& s, A direction,
                                   int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / s.seq, t = token % s.seq;
    const int64_t row = b * s.table_stride_batch + t * s.half;
    for (int64_t g = 0; g < s.groups; ++g) {
      const T* head = x + b * s.stride_batch + t * s.stride_seq + g * s.stride_group;
      T* out = y + (token * s.groups + g) * s.per_group * s.head_dim;
      for (int64_t h = 0; h < s.per_group; ++h) {
        rotate_head<T, A>(head + h * s.stride_head, cos + row, sin + row, out + h * s.head_dim, s.half, s.head_dim,
                          direction);
      }
    }
  }
}

// One function per type instead of a template, because target_clones does not apply to templates.
#define MEGALITE_ROTATE(T, A)                                                                                \
  MEGALITE_CLONES void rotate(const T* x, const A* cos, const A* sin, T* y, const RopeShape& s, A direction, \
                              int64_t begin, int64_t end) {                                                  \
    rotate_tokens<T, A>(x, cos, sin, y, s, direction, begin, end);                                           \
  }
MEGALITE_ROTATE(float, float)
MEGALITE_ROTATE(double, double)
MEGALITE_ROTATE(bf16, float)

}  // namespace
}  // namespace megalite

void megalite_rope_cpu(MegaliteDType dtype, const void* x, const void* cos, const void* sin, void* y, RopeShape s,
                       bool inverse) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    using A = typename megalite::Accumulate<T>::type;
    const int64_t token_size = s.groups * s.per_group * s.head_dim;
    at::parallel_for(0, s.batch * s.seq, std::max<int64_t>(1, 32768 / token_size), [&](int64_t begin, int64_t end) {
      megalite::rotate(static_cast<const T*>(x), static_cast<const A*>(cos), static_cast<const A*>(sin),
                       static_cast<T*>(y), s, inverse ? A(-1) : A(1), begin, end);
    });
  };
  if (dtype == kFloat32) run(static_cast<float*>(nullptr));
  if (dtype == kFloat64) run(static_cast<double*>(nullptr));
  if (dtype == kBFloat16) run(static_cast<megalite::bf16*>(nullptr));
}
