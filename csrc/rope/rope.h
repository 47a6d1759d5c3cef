#pragma once

#include <stdint.h>

#include "../dtype.h"
#if defined(__CUDACC__) || defined(MEGALITE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

// Rotary position embedding, half-split as in Llama: the first 2 · half features of each head are rotated, feature i
// with feature i + half, by the angle whose cosine and sine are in the tables [seq, half]; the rest are copied. Heads
// are indexed as [groups, per_group], so that the queries inside a fused qkv (kv group by kv group) need no copy.
// Strides count elements; the last dim is dense. Tables are float, or double for double features.
typedef struct {
  int64_t batch, seq, groups, per_group, head_dim, half;
  int64_t stride_batch, stride_seq, stride_group, stride_head;
  int64_t table_stride_batch;  // 0 when all sequences of the batch share one table
} RopeShape;

#ifdef __cplusplus
extern "C" {
#endif

// y = rotate(x), dense; `inverse` rotates back, which is also the gradient.
void megalite_rope_cpu(MegaliteDType, const void* x, const void* cos, const void* sin, void* y, RopeShape shape,
                       bool inverse);

#if defined(__CUDACC__) || defined(MEGALITE_WITH_CUDA)
cudaError_t megalite_rope_cuda(MegaliteDType, const void* x, const void* cos, const void* sin, void* y, RopeShape shape,
                               bool inverse, cudaStream_t stream);
#endif

#ifdef __cplusplus
}
#endif
