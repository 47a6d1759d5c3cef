#pragma once

#include <stdint.h>

#include "../dtype.h"
#if defined(__CUDACC__) || defined(MEGALITE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

// Scale, causal mask and softmax in one pass over attention scores [batch, heads, queries, keys]. The last query sees
// all keys; query q sees keys 0 … q + keys - queries. Masked keys get probability 0, and so does every key of a row
// whose visible scores are all -inf. Strides count elements; the last dim is dense.
typedef struct {
  int64_t batch, heads, queries, keys;
  int64_t stride_batch, stride_head, stride_query;
} ScoreShape;

#ifdef __cplusplus
extern "C" {
#endif

// probs = softmax(mask(scale · scores)): scores strided as in `shape`, probs dense.
void megalite_softmax_forward_cpu(MegaliteDType, const void* scores, void* probs, ScoreShape shape, double scale);
// grad_scores = scale · probs · (grad - Σ grad · probs): grad strided as in `shape`, the others dense.
void megalite_softmax_backward_cpu(MegaliteDType, const void* grad, const void* probs, void* grad_scores,
                                   ScoreShape shape, double scale);

#if defined(__CUDACC__) || defined(MEGALITE_WITH_CUDA)
cudaError_t megalite_softmax_forward_cuda(MegaliteDType, const void* scores, void* probs, ScoreShape shape,
                                          double scale, cudaStream_t stream);
cudaError_t megalite_softmax_backward_cuda(MegaliteDType, const void* grad, const void* probs, void* grad_scores,
                                           ScoreShape shape, double scale, cudaStream_t stream);
#endif

#ifdef __cplusplus
}
#endif
