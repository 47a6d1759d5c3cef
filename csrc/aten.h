#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "dtype.h"
#ifdef MEGALITE_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace megalite {

// The enum value of a tensor's dtype; float16 is supported on GPUs only, because CPUs have no fast path for it.
inline MegaliteDType dtype_of(const at::Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      TORCH_CHECK(t.is_cuda(), "megalite::", op, ": float16 is supported on CUDA only");
      return kFloat16;
    default:
      TORCH_CHECK(false, "megalite::", op, ": dtype ", t.scalar_type(), " is not supported");
  }
}

// Kernels accept any strides but need a dense last dim.
inline at::Tensor with_dense_rows(const at::Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

}  // namespace megalite
