// The fused causal softmax as a torch op: checks, output buffers, and registration for each device.
#include "softmax.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../aten.h"

namespace megalite {
namespace {

ScoreShape shape_of(const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 4, "megalite::causal_softmax: scores must be [b, heads, s_q, s_k], got ", t.sizes());
  TORCH_CHECK(t.size(3) >= t.size(2), "megalite::causal_softmax: s_k=", t.size(3), " is less than s_q=", t.size(2));
  TORCH_CHECK(t.size(3) < (int64_t{1} << 31), "megalite::causal_softmax: s_k=", t.size(3), " is 2^31 or more");
  return {t.size(0), t.size(1), t.size(2), t.size(3), t.stride(0), t.stride(1), t.stride(2)};
}

// `launch`: the kernel for one device.
template <class Launch>
at::Tensor forward(const at::Tensor& scores, double scale, Launch launch) {
  const at::Tensor x = with_dense_rows(scores);
  const ScoreShape shape = shape_of(x);
  at::Tensor probs = at::empty_like(x, at::MemoryFormat::Contiguous);
  if (x.numel() > 0) {
    launch(dtype_of(x, "causal_softmax"), x.const_data_ptr(), probs.mutable_data_ptr(), shape, scale);
  }
  return probs;
}

template <class Launch>
at::Tensor backward(const at::Tensor& grad, const at::Tensor& probs, double scale, Launch launch) {
  TORCH_CHECK(grad.sizes() == probs.sizes() && grad.scalar_type() == probs.scalar_type(),
              "megalite::causal_softmax_backward: grad is ", grad.scalar_type(), grad.sizes(), ", probs are ",
              probs.scalar_type(), probs.sizes());
  const at::Tensor g = with_dense_rows(grad), p = probs.contiguous();
  const ScoreShape shape = shape_of(g);
  at::Tensor out = at::empty_like(p, at::MemoryFormat::Contiguous);
  if (p.numel() > 0) {
    launch(dtype_of(p, "causal_softmax_backward"), g.const_data_ptr(), p.const_data_ptr(), out.mutable_data_ptr(),
           shape, scale);
  }
  return out;
}

at::Tensor forward_cpu(const at::Tensor& scores, double scale) {
  return forward(scores, scale, megalite_softmax_forward_cpu);
}

at::Tensor backward_cpu(const at::Tensor& grad, const at::Tensor& probs, double scale) {
  return backward(grad, probs, scale, megalite_softmax_backward_cpu);
}

#ifdef MEGALITE_WITH_CUDA
at::Tensor forward_cuda(const at::Tensor& scores, double scale) {
  const c10::cuda::CUDAGuard guard(scores.device());
  return forward(scores, scale, [](auto... args) {
    C10_CUDA_CHECK(megalite_softmax_forward_cuda(args..., c10::cuda::getCurrentCUDAStream()));
  });
}

at::Tensor backward_cuda(const at::Tensor& grad, const at::Tensor& probs, double scale) {
  const c10::cuda::CUDAGuard guard(probs.device());
  return backward(grad, probs, scale, [](auto... args) {
    C10_CUDA_CHECK(megalite_softmax_backward_cuda(args..., c10::cuda::getCurrentCUDAStream()));
  });
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(megalite, CPU, m) {
  m.impl("causal_softmax", &forward_cpu);
  m.impl("causal_softmax_backward", &backward_cpu);
}

#ifdef MEGALITE_WITH_CUDA
TORCH_LIBRARY_IMPL(megalite, CUDA, m) {
  m.impl("causal_softmax", &forward_cuda);
  m.impl("causal_softmax_backward", &backward_cuda);
}
#endif

}  // namespace megalite
