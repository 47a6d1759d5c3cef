"""The model and its loss, written from torch functions and formulas: the reference of every option."""

import dataclasses
import math
from typing import Any

import torch
from models import tiny
from parity import BATCH, MICROBATCHES, SEQ, batches
from torch import Tensor

from megalite import ops
from megalite.config import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig, check, resolve
from megalite.config.shapes import shapes
from megalite.engine.batches import Microbatch
from megalite.engine.engine import build
from megalite.model.attention import rope_scaling
from megalite.model.decoder import Decoder
from megalite.model.dropout import keep_mask, sample_keys
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads

Weights = dict[str, Tensor]


def make_config(
    model: dict[str, Any], parallel: dict[str, Any], train: dict[str, Any] | None = None, smoothing: float = 0.0
) -> Config:
    """A resolved, checked float64 configuration on the ranks it names."""
    layout = ParallelConfig(**({"tp": 1, "pp": 1, "dp": 1, "sp": False, "bucket_mb": 0.02} | parallel))
    sizes = {"seq_len": SEQ, "micro_batch_size": BATCH, "global_batch_size": BATCH * MICROBATCHES, "dtype": "fp64"}
    config = Config(
        model=tiny(norm_eps=1e-3, **model),
        parallel=layout,
        train=TrainConfig(**(sizes | (train or {}))),
        optim=OptimConfig(label_smoothing=smoothing),
    )
    ranks = layout.tp * layout.pp * layout.dp
    config = resolve(config, ranks)
    check(config, ranks)
    return config


def numbered(isolated: bool) -> list[Microbatch]:
    """The batches, each sample with its number."""
    found = batches(isolated)
    return [dataclasses.replace(mb, samples=torch.arange(i * BATCH, (i + 1) * BATCH)) for i, mb in enumerate(found)]


def largest_error(config: Config, weights: Weights, isolated: bool, loss: float, grads: Weights) -> float:
    """Of the summed loss and of every rank's part of every gradient, relative to the largest of its tensor."""

    def main(world: World) -> tuple:
        engine = build(config, world, lambda name, shape: weights[name])
        dp = engine.mesh.dp
        summed = engine.forward_backward(numbered(isolated)[dp.rank :: dp.size])["loss"]
        held = {name: engine.grads.held(name) for name in engine.grads.spans}
        return summed, engine.shards, held, engine.grads.reduced

    p = config.parallel
    assert p.dp is not None
    ranks = run_threads(p.tp * p.pp * p.dp, main)
    errors = [abs(sum(rank[0] for rank in ranks) - loss) / loss]
    names = set()
    for _, shards, held, found in ranks:
        names |= found.keys()
        for name, grad in found.items():
            whole = grads[name]
            local = shards[name].cut(whole).flatten()[held[name].start : held[name].stop]
            errors.append(max(((grad.flatten() - local).abs() / whole.abs().max()).tolist(), default=0.0))
    assert names == grads.keys()
    return max(errors)


GPT2 = {
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "position": "learned",
    "max_positions": SEQ + 3,
    "linear_bias": True,
    "tie_embeddings": True,
    "num_kv_heads": 4,
}


LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_max_positions": 32, "rope_theta": 50.0}
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_max_positions": 32, "rope_theta": 50.0}


def seen_keys(mb: Microbatch, isolated: bool, window: int | None) -> Tensor:
    """[b, s, s]: which key each query sees; by documents where `isolated`."""
    index = torch.arange(SEQ)
    seen = (index[:, None] >= index).expand(BATCH, SEQ, SEQ)
    if isolated:
        document = (mb.positions == 0).cumsum(1)
        seen = seen & (document[:, :, None] == document[:, None, :])
    return seen if window is None else seen & (index[:, None] - index < window)


def normed(x: Tensor, w: Weights, name: str, c: ModelConfig) -> Tensor:
    if f"{name}.bias" in w:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
    return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[f"{name}.weight"]


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of features as complex numbers, turned."""
    half = cos.shape[-1]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)


ACTIVATIONS = {
    "swiglu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


ACTIVATIONS |= {"geglu": ACTIVATIONS["gelu"], "geglu_tanh": ACTIVATIONS["gelu_tanh"]}


def loss_of(w: Weights, c: ModelConfig, mb: Microbatch, isolated: bool, smoothing: float) -> Tensor:
    """The summed loss of a microbatch, by formulas."""
    n, d, groups = c.num_heads, c.head_dim, c.num_kv_heads
    keys = sample_keys(TrainConfig().seed, mb.samples)

    def dropped(x: Tensor, p: float, site: int) -> Tensor:
        return x * keep_mask(keys, site, x.shape, p) / (1 - p)

    x = w["embed.weight"][mb.tokens]
    if c.position == "learned":
        x = x + w["pos_embed.weight"][mb.positions]
    tables = ops.rope_cos_sin(mb.positions, int(d * c.rope_fraction), c.rope_theta, x.dtype, rope_scaling(c))
    cos, sin = (t[:, :, None] for t in tables)
    x = dropped(x, c.dropout, 0)
    hidden = ~seen_keys(mb, isolated, c.sliding_window)[:, None]
    for i in range(c.num_layers):
        at = f"layers.{i}"
        qkv = linear(normed(x, w, f"{at}.attn_norm", c), w, f"{at}.attn.qkv").view(BATCH, SEQ, groups, -1, d)
        q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        if c.qk_norm:
            q, k = normed(q, w, f"{at}.attn.q_norm", c), normed(k, w, f"{at}.attn.k_norm", c)
        if c.position == "rope":
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        k, v = k.repeat_interleave(n // groups, 2), v.repeat_interleave(n // groups, 2)
        scores = torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(d)
        scores = dropped(scores.masked_fill(hidden, -torch.inf).softmax(-1), c.attention_dropout, 3 * i + 1)
        out = torch.einsum("bnqk,bknd->bqnd", scores, v).flatten(2)
        x = x + dropped(linear(out, w, f"{at}.attn.out"), c.dropout, 3 * i + 2)
        y, act = normed(x, w, f"{at}.mlp_norm", c), ACTIVATIONS[c.activation]
        if f"{at}.mlp.up.weight" in w:
            y = act(linear(y, w, f"{at}.mlp.up"))
        else:
            gate, up = linear(y, w, f"{at}.mlp.gate_up").split(c.ffn_hidden_size, -1)
            y = act(gate) * up
        x = x + dropped(linear(y, w, f"{at}.mlp.down"), c.dropout, 3 * i + 3)
    head = w["embed.weight" if c.tie_embeddings else "loss_head.head.weight"]
    log_p = (normed(x, w, "loss_head.norm", c) @ head.T).log_softmax(-1)
    target = log_p.gather(-1, mb.labels[..., None])[..., 0]
    return -(mb.loss_mask * ((1 - smoothing) * target + smoothing * log_p.mean(-1))).sum()


def formula_reference(config: Config, isolated: bool) -> tuple[Weights, float, Weights]:
    c = config.model
    with torch.device("meta"):
        whole = {name: p.shape for name, p in Decoder(c, range(c.num_layers)).named_parameters()}
    assert sorted(whole) == sorted(shapes(c))
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in whole.items():
        center = 1.0 if name.endswith("norm.weight") else 0.0
        weights[name] = torch.empty(shape, dtype=torch.float64).normal_(center, 0.2, generator=generator)
        weights[name].requires_grad_()
    losses = [loss_of(weights, c, mb, isolated, config.optim.label_smoothing) for mb in numbered(isolated)]
    sum(losses).backward()
    return (
        {name: w.detach() for name, w in weights.items()},
        sum(losses).item(),
        {name: w.grad for name, w in weights.items()},
    )
