"""Bytes that a forward keeps for its backward, by arithmetic alone; docs/memory.md has it as a table. No torch here."""

from __future__ import annotations

import math

from megalite.config import Resolved
from megalite.config.dtypes import DTYPES


def activation_bytes(config: Resolved, recompute: str = "none") -> int:
    """Bytes that one block keeps of one microbatch for its backward, on one tp rank, if it recomputes so.

    After Korthikanti et al. 2022, section 4, for this block: inputs and outputs of the two norms; query, key, value and
    output of the attention core (kv heads repeated; a value that is not repeated is a view of the whole qkv product,
    which qk-norm keeps too), scores where torch's fused attention does not do without; and four times the feed-forward
    width, two where it has no gate. A recomputed core keeps its inputs and output, a recomputed block its input alone.
    """
    m, p, t = config.model, config.parallel, config.train
    residual = m.hidden_size / (p.tp if p.sp else 1)
    heads, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    repeated = kv < heads
    product = heads + 2 * kv
    core: float = 4 * heads + product * m.qk_norm if repeated else 3 * heads + product
    if m.attention_dropout:
        # softmax's output, what dropout makes of it, and a mask of one byte
        core += m.num_heads * t.seq_len * (2 + 1 / DTYPES[t.dtype].bytes)
    elif t.kernels != "auto" and m.sliding_window is None:
        # probabilities; the reference keeps them before and after it empties hidden rows
        core += m.num_heads * t.seq_len * (1 if t.kernels == "fused" else 2)
    if recompute == "selective":
        core = 2 * heads + kv + product
    feed_forward = (4 if m.gated else 2) * m.ffn_hidden_size
    masks = 2 * residual / DTYPES[t.dtype].bytes if m.dropout else 0
    kept = residual if recompute == "full" else 4 * residual + masks + (core + feed_forward) / p.tp
    return int(t.micro_batch_size * t.seq_len * DTYPES[t.dtype].bytes * kept)


def stage_activation_bytes(config: Resolved, layers: int) -> int:
    """Bytes of activations that a stage of `layers` blocks keeps of one microbatch, on one tp rank."""
    p = config.parallel
    again = 0 if p.recompute == "none" else min(layers, p.recompute_layers or layers)
    return again * activation_bytes(config, p.recompute) + (layers - again) * activation_bytes(config)


def recompute_bytes(config: Resolved) -> int:
    """Bytes that a recomputing block makes for its own backward, on one tp rank; one block of a rank at a time."""
    return 0 if config.parallel.recompute == "none" else activation_bytes(config)


def deferred_bytes(config: Resolved, layers: int, last: bool) -> int:
    """Bytes that a stage keeps of one microbatch from input gradient to weight gradient, on one tp rank.

    Of each linear its input and its output gradient; `last`: of the head, too. An upper bound with frozen linears.
    """
    m, p, t = config.model, config.parallel, config.train
    heads, products = m.num_heads * m.head_dim, (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    inputs = 2 * m.hidden_size / (p.tp if p.sp else 1) + (heads + m.ffn_hidden_size) / p.tp
    gradients = (products + (2 if m.gated else 1) * m.ffn_hidden_size) / p.tp + 2 * m.hidden_size
    head = m.hidden_size / (p.tp if p.sp else 1) + math.ceil(m.vocab_size / p.tp) if last else 0
    return int(t.micro_batch_size * t.seq_len * DTYPES[t.dtype].bytes * (layers * (inputs + gradients) + head))
