"""A Llama-style decoder written as if for one device: no group, no rank, no collective.

What parallelism and kernels change, they change by swapping named modules: the linears `qkv`, `out`, `gate_up`, `down`,
`embed` and `head`, the attention `core`, and the `cross_entropy` of the loss head. A pipeline stage is the same model
with the layers it does not own left out, so parameter names are the same at every topology.

Llama 2: Touvron et al. 2023; GQA: Ainslie et al. 2023; RoPE: Su et al. 2021; SwiGLU: Shazeer 2020.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite import ops
from megalite.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019); statistics in at least fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class AttentionCore(nn.Module):
    """softmax(q kᵀ / sqrt(d)) v without parameters.

    q [b, s, heads, d], k and v [b, s, kv, d]; gives [b, s, heads, d]. `positions` [b, s]. `bounds` [b, s, 2]: each
    query sees the keys of the half-open range it names; None: causal over the whole sequence.
    """

    def __init__(self, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, bounds: Tensor | None) -> Tensor:
        repeat = q.shape[2] // k.shape[2]
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if bounds is None and self.kernel in ("fused", "torch"):
            scores = q @ k.transpose(-2, -1)
            out = ops.causal_softmax(scores, q.shape[-1] ** -0.5, kernel=self.kernel) @ v
        elif bounds is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keys = torch.arange(k.shape[2], device=k.device)
            seen = (keys >= bounds[..., :1]) & (keys < bounds[..., 1:])
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(1))
        return out.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention; the rows of `qkv` are ordered [queries, key, value] by kv group."""

    def __init__(self, c: ModelConfig, kernel: str) -> None:
        super().__init__()
        assert c.num_kv_heads is not None
        assert c.head_dim is not None
        self.head_dim, self.kernel = c.head_dim, kernel
        # query heads of one kv group; the only size a cut may change (replicated kv heads share a group's queries)
        self.queries = c.num_heads // c.num_kv_heads
        width = c.num_heads * c.head_dim
        self.qkv = nn.Linear(c.hidden_size, width + 2 * c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(width, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.core: nn.Module = AttentionCore(kernel)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor, bounds: Tensor | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.queries + 2, self.head_dim))
        q, k, v = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = ops.apply_rope(q, *rope, kernel=self.kernel).flatten(2, 3)
        k = ops.apply_rope(k, *rope, kernel=self.kernel)
        return self.out(self.core(q, k, v, positions, bounds).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), gate and up in one product."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.ffn_hidden_size, bias=False)
        self.down = nn.Linear(c.ffn_hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, c: ModelConfig, kernel: str) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attn = Attention(c, kernel)
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor, bounds: Tensor | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rope, positions, bounds)
        return x + self.mlp(self.mlp_norm(x))


class CrossEntropy(nn.Module):
    """Σ mask · (−log softmax(logits)[label]) over logits [b, s, vocab], in at least fp32."""

    def forward(self, logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ce = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)
        return (ce * loss_mask).sum()

    def whole(self, logits: Tensor) -> Tensor:
        """Logits over the whole vocabulary: here they are already."""
        return logits


class LossHead(nn.Module):
    """Final norm and output head: hidden [b, s, h] to the summed loss, or without labels to logits [b, s, vocab]."""

    def __init__(self, norm: RMSNorm, head: nn.Linear) -> None:
        super().__init__()
        self.norm, self.head = norm, head
        self.cross_entropy = CrossEntropy()

    def forward(self, hidden: Tensor, labels: Tensor | None = None, loss_mask: Tensor | None = None) -> Tensor:
        logits = self.head(self.norm(hidden))
        if labels is None:
            return self.cross_entropy.whole(logits)
        return self.cross_entropy(logits, labels, loss_mask)


class Decoder(nn.Module):
    """The layers `layers` of the model; `first` has the embedding, `last` the loss head.

    The whole model is `Decoder(config, range(config.num_layers))`.
    """

    def __init__(
        self, c: ModelConfig, layers: Sequence[int], first: bool = True, last: bool = True, kernel: str = "auto"
    ) -> None:
        super().__init__()
        assert c.head_dim is not None
        self.head_dim, self.rope_theta = c.head_dim, c.rope_theta
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size) if first else None
        self.layers = nn.ModuleDict({str(layer): Block(c, kernel) for layer in layers})
        self.loss_head = None
        if last:
            head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
            if c.tie_embeddings and self.embed is not None:
                head.weight = self.embed.weight
            self.loss_head = LossHead(RMSNorm(c.hidden_size, c.norm_eps), head)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        bounds: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens [b, s] (first stage) or hidden states [b, s, h] in; hidden states out, or what the loss head gives.

        `positions` [b, s], `bounds` as in AttentionCore, `labels` and `loss_mask` [b, s].
        """
        if self.embed is not None:
            x = self.embed(x)
        rope = ops.rope_cos_sin(positions, self.head_dim, self.rope_theta, torch.promote_types(x.dtype, torch.float32))
        for block in self.layers.values():
            x = block(x, rope, positions, bounds)
        return x if self.loss_head is None else self.loss_head(x, labels, loss_mask)
