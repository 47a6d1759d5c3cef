#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>

#include "../simd.h"
#include "softmax.h"

namespace megalite {
namespace {

int64_t row_offset(const ScoreShape& s, int64_t row) {
  const int64_t query = row % s.queries, head = row / s.queries % s.heads, batch = row / s.queries / s.heads;
  return batch * s.stride_batch + head * s.stride_head + query * s.stride_query;
}

int64_t visible_keys(const ScoreShape& s, int64_t row) { return row % s.queries + 1 + s.keys - s.queries; }

// `exps` holds the row's exponentials: scratch for bf16, the output row itself otherwise. The row stays in cache
// between the three loops, so memory is read and written once.
template <class T, class A>
MEGALITE_INLINE void forward_row(const T* x, T* y, A* exps, int64_t visible, int64_t keys, A scale) {
  A peak = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : peak)
  for (int64_t j = 0; j < visible; ++j) {
    const A v = widen(x[j]) * scale;
    peak = v > peak ? v : peak;
  }
  // All -inf (or NaN): subtracting 0 instead gives zeros (or NaN) where -inf - -inf would give NaN.
  if (peak == -std::numeric_limits<A>::infinity()) peak = 0;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < visible; ++j) {
    const A scaled = widen(x[j]) * scale;
    const A e = exp_nonpositive(scaled - peak);
    exps[j] = e;
    sum += e;
  }
  const A inverse = sum == 0 ? A(0) : 1 / sum;
#pragma omp simd
  for (int64_t j = 0; j < visible; ++j) y[j] = narrow<T, A>(exps[j] * inverse);
  std::memset(y + visible, 0, (keys - visible) * sizeof(T));
}

template <class T, class A>
MEGALITE_INLINE void backward_row(const T* grad, const T* probs, T* out, int64_t visible, int64_t keys, A scale) {
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < visible; ++j) dot += widen(grad[j]) * widen(probs[j]);
#pragma omp simd
  for (int64_t j = 0; j < visible; ++j) {
    out[j] = narrow<T, A>(scale * widen(probs[j]) * (widen(grad[j]) - dot));
  }
  std::memset(out + visible, 0, (keys - visible) * sizeof(T));
}

// One function per type and direction, no templates: target_clones does not apply to them.
#define MEGALITE_ROWS(T, A)                                                                                      \
  MEGALITE_CLONES void forward(const T* x, T* y, A* exps, int64_t visible, int64_t keys, A scale) {              \
    forward_row<T, A>(x, y, exps, visible, keys, scale);                                                         \
  }                                                                                                              \
  MEGALITE_CLONES void backward(const T* grad, const T* probs, T* out, int64_t visible, int64_t keys, A scale) { \
    backward_row<T, A>(grad, probs, out, visible, keys, scale);                                                  \
  }
MEGALITE_ROWS(float, float)
MEGALITE_ROWS(double, double)
MEGALITE_ROWS(bf16, float)

// Rows that one thread should at least be given.
int64_t grain(const ScoreShape& s) { return std::max<int64_t>(1, 32768 / s.keys); }

template <class T>
void forward_all(const T* scores, T* probs, const ScoreShape& s, double scale) {
  using A = typename Accumulate<T>::type;
  at::parallel_for(0, s.batch * s.heads * s.queries, grain(s), [&](int64_t begin, int64_t end) {
    std::unique_ptr<A[]> scratch(std::is_same_v<T, A> ? nullptr : new A[s.keys]);
    for (int64_t r = begin; r < end; ++r) {
      T* y = probs + r * s.keys;
      A* exps = std::is_same_v<T, A> ? reinterpret_cast<A*>(y) : scratch.get();
      forward(scores + row_offset(s, r), y, exps, visible_keys(s, r), s.keys, static_cast<A>(scale));
    }
  });
}

template <class T>
void backward_all(const T* grad, const T* probs, T* out, const ScoreShape& s, double scale) {
  using A = typename Accumulate<T>::type;
  at::parallel_for(0, s.batch * s.heads * s.queries, grain(s), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t dense = r * s.keys;
      backward(grad + row_offset(s, r), probs + dense, out + dense, visible_keys(s, r), s.keys, static_cast<A>(scale));
    }
  });
}

}  // namespace
}  // namespace megalite

using megalite::bf16;

void megalite_softmax_forward_cpu(MegaliteDType dtype, const void* scores, void* probs, ScoreShape shape,
                                  double scale) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    megalite::forward_all(static_cast<const T*>(scores), static_cast<T*>(probs), shape, scale);
  };
  if (dtype == kFloat32) run(static_cast<float*>(nullptr));
  if (dtype == kFloat64) run(static_cast<double*>(nullptr));
  if (dtype == kBFloat16) run(static_cast<bf16*>(nullptr));
}

void megalite_softmax_backward_cpu(MegaliteDType dtype, const void* grad, const void* probs, void* grad_scores,
                                   ScoreShape shape, double scale) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    megalite::backward_all(static_cast<const T*>(grad), static_cast<const T*>(probs), static_cast<T*>(grad_scores),
                           shape, scale);
  };
  if (dtype == kFloat32) run(static_cast<float*>(nullptr));
  if (dtype == kFloat64) run(static_cast<double*>(nullptr));
  if (dtype == kBFloat16) run(static_cast<bf16*>(nullptr));
}
