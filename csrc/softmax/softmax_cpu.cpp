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

// Rows are processed slightly past the diagonal, to a multiple of the widest vector, with those keys masked: short
// rows would otherwise spend most of their time in the loops' scalar tails.
int32_t walked(int64_t visible, int64_t keys) {
  return static_cast<int32_t>(std::min<int64_t>(keys, (visible + 15) / 16 * 16));
}

// `exps` receives the row's exponentials: a scratch buffer for bf16, else the output row itself. The row stays in
// cache between the three loops, so memory is read and written once.
template <class T, class A>
MEGALITE_INLINE void forward_row(const T* x, T* y, A* exps, int32_t visible, int32_t walk, A scale) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  A peak = lowest;
#pragma omp simd reduction(max : peak)
  for (int32_t j = 0; j < walk; ++j) {
    const A v = j < visible ? widen(x[j]) * scale : lowest;
    peak = v > peak ? v : peak;
  }
  // all -inf (or NaN): subtracting 0 yields zeros (or NaN), while -inf - -inf would yield NaN
  if (peak == lowest) peak = 0;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int32_t j = 0; j < walk; ++j) {
    const A scaled = widen(x[j]) * scale;
    const A e = exp_nonpositive(j < visible ? scaled - peak : lowest);
    exps[j] = e;
    sum += e;
  }
  const A inverse = sum == 0 ? A(0) : 1 / sum;
#pragma omp simd
  for (int32_t j = 0; j < walk; ++j) y[j] = narrow<T, A>(exps[j] * inverse);
}

template <class T, class A>
MEGALITE_INLINE void backward_row(const T* grad, const T* probs, T* out, int32_t visible, int32_t walk, A scale) {
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int32_t j = 0; j < walk; ++j) dot += j < visible ? widen(grad[j]) * widen(probs[j]) : A(0);
#pragma omp simd
  for (int32_t j = 0; j < walk; ++j) {
    const A d = scale * widen(probs[j]) * (widen(grad[j]) - dot);
    out[j] = narrow<T, A>(j < visible ? d : A(0));
  }
}

// One function per type and direction instead of a template, because target_clones does not apply to templates.
#define MEGALITE_ROWS(T, A)                                                                                      \
  MEGALITE_CLONES void forward(const T* x, T* y, A* exps, int32_t visible, int32_t walk, A scale) {              \
    forward_row<T, A>(x, y, exps, visible, walk, scale);                                                         \
  }                                                                                                              \
  MEGALITE_CLONES void backward(const T* grad, const T* probs, T* out, int32_t visible, int32_t walk, A scale) { \
    backward_row<T, A>(grad, probs, out, visible, walk, scale);                                                  \
  }
MEGALITE_ROWS(float, float)
MEGALITE_ROWS(double, double)
MEGALITE_ROWS(bf16, float)

// The least number of rows per thread.
int64_t grain(const ScoreShape& s) { return std::max<int64_t>(1, 32768 / s.keys); }

template <class T>
void forward_all(const T* scores, T* probs, const ScoreShape& s, double scale) {
  using A = typename Accumulate<T>::type;
  at::parallel_for(0, s.batch * s.heads * s.queries, grain(s), [&](int64_t begin, int64_t end) {
    std::unique_ptr<A[]> scratch(std::is_same_v<T, A> ? nullptr : new A[s.keys]);
    for (int64_t r = begin; r < end; ++r) {
      T* y = probs + r * s.keys;
      A* exps = std::is_same_v<T, A> ? reinterpret_cast<A*>(y) : scratch.get();
      const int64_t visible = visible_keys(s, r), walk = walked(visible, s.keys);
      forward(scores + row_offset(s, r), y, exps, visible, walk, static_cast<A>(scale));
      std::memset(y + walk, 0, (s.keys - walk) * sizeof(T));
    }
  });
}

template <class T>
void backward_all(const T* grad, const T* probs, T* out, const ScoreShape& s, double scale) {
  using A = typename Accumulate<T>::type;
  at::parallel_for(0, s.batch * s.heads * s.queries, grain(s), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t dense = r * s.keys, visible = visible_keys(s, r), walk = walked(visible, s.keys);
      backward(grad + row_offset(s, r), probs + dense, out + dense, visible, walk, static_cast<A>(scale));
      std::memset(out + dense + walk, 0, (s.keys - walk) * sizeof(T));
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
