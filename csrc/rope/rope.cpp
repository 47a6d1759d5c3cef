// Rotary embeddings as a torch op: checks, output buffer, and registration for each device.
#include "rope.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../aten.h"

namespace megalite {
namespace {

RopeShape shape_of(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  TORCH_CHECK(x.dim() == 4 || x.dim() == 5,
              "megalite::rope: x must be [b, s, heads, head_dim] or [b, s, groups, heads, head_dim], got ", x.sizes());
  const int64_t last = x.dim() - 1, half = cos.size(-1);
  TORCH_CHECK(cos.sizes() == sin.sizes(), "megalite::rope: cos is ", cos.sizes(), ", sin is ", sin.sizes());
  TORCH_CHECK((cos.dim() == 2 && cos.size(0) == x.size(1)) ||
                  (cos.dim() == 3 && cos.size(0) == x.size(0) && cos.size(1) == x.size(1)),
              "megalite::rope: cos must be [s, rot_dim/2] or [b, s, rot_dim/2] for x ", x.sizes(), ", got ",
              cos.sizes());
  TORCH_CHECK(2 * half <= x.size(last), "megalite::rope: rot_dim=", 2 * half, " exceeds head_dim=", x.size(last));
  const at::ScalarType table = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(cos.scalar_type() == table && sin.scalar_type() == table, "megalite::rope: cos and sin must be ", table,
              " for x of ", x.scalar_type());
  TORCH_CHECK(cos.device() == x.device() && sin.device() == x.device(), "megalite::rope: x is on ", x.device(),
              ", cos on ", cos.device(), ", sin on ", sin.device());
  const bool grouped = x.dim() == 5;
  return {x.size(0),
          x.size(1),
          grouped ? x.size(2) : 1,
          x.size(last - 1),
          x.size(last),
          half,
          x.stride(0),
          x.stride(1),
          x.stride(2),
          x.stride(last - 1),
          cos.dim() == 3 ? cos.size(1) * half : 0};
}

// `launch`: the kernel for one device.
template <class Launch>
at::Tensor rope(const at::Tensor& input, const at::Tensor& cos, const at::Tensor& sin, bool inverse, Launch launch) {
  const at::Tensor x = with_dense_rows(input), c = cos.contiguous(), s = sin.contiguous();
  const RopeShape shape = shape_of(x, c, s);
  at::Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
  if (x.numel() > 0) {
    launch(dtype_of(x, "rope"), x.const_data_ptr(), c.const_data_ptr(), s.const_data_ptr(), y.mutable_data_ptr(), shape,
           inverse);
  }
  return y;
}

at::Tensor rope_cpu(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool inverse) {
  return rope(x, cos, sin, inverse, megalite_rope_cpu);
}

#ifdef MEGALITE_WITH_CUDA
at::Tensor rope_cuda(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool inverse) {
  const c10::cuda::CUDAGuard guard(x.device());
  return rope(x, cos, sin, inverse,
              [](auto... args) { C10_CUDA_CHECK(megalite_rope_cuda(args..., c10::cuda::getCurrentCUDAStream())); });
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(megalite, CPU, m) { m.impl("rope", &rope_cpu); }

#ifdef MEGALITE_WITH_CUDA
TORCH_LIBRARY_IMPL(megalite, CUDA, m) { m.impl("rope", &rope_cuda); }
#endif

}  // namespace megalite
