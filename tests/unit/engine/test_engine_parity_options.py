"""Every model option, at every kind of topology: loss and all gradients, in float64.

Named families are compared with Hugging Face's models. A covering set, in which each value of a lever meets each value
of every other, is compared with a model written here from torch functions and formulas.
"""

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import tiny
from test_engine_parity import BATCH, MICROBATCHES, SEQ, TOLERANCE, batches, rms_norm
from torch import Tensor

from megalite import ops
from megalite.config import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig, check, resolve
from megalite.config.shapes import shapes
from megalite.engine.batches import Microbatch
from megalite.engine.engine import build
from megalite.model.attention import rope_scaling
from megalite.model.decoder import Decoder
from megalite.model.dropout import keep_mask, sample_keys
from megalite.model.layouts import from_hf
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


# --- families -------------------------------------------------------------------------------------------------------

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
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "llama3": ("Llama", LLAMA3 | {"head_dim": 16}),
    "linear": ("Llama", {"rope_scaling": "linear", "rope_factor": 3.0}),
    "yarn": ("Llama", YARN | {"head_dim": 16}),
    "yarn-mscale": ("Llama", YARN | {"rope_mscale": 1.4, "rope_mscale_all_dim": 0.7, "rope_beta_fast": 4.0}),
    "biases": ("Llama", {"linear_bias": True, "activation": "geglu_tanh"}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"sliding_window": 3, "qkv_bias": True}),
    "stablelm": ("StableLm", {"norm": "layernorm", "rope_fraction": 0.34, "qkv_bias": True}),
}


def hf_config(family: str, c: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of Hugging Face's configuration: the map that docs/model-options.md states."""
    if family == "GPT2":
        return {
            "vocab_size": c.vocab_size,
            "n_positions": c.max_positions,
            "n_embd": c.hidden_size,
            "n_layer": c.num_layers,
            "n_head": c.num_heads,
            "n_inner": c.ffn_hidden_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": c.norm_eps,
            "tie_word_embeddings": c.tie_embeddings,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": c.rope_theta,
        "partial_rotary_factor": c.rope_fraction,
    }
    if c.rope_scaling != "none":
        rope |= {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = c.rope_original_max_positions
    if c.rope_scaling == "llama3":
        rope |= {"low_freq_factor": c.rope_low_freq_factor, "high_freq_factor": c.rope_high_freq_factor}
    if c.rope_scaling == "yarn":
        rope |= {"beta_fast": c.rope_beta_fast, "beta_slow": c.rope_beta_slow}
        rope |= {"mscale": c.rope_mscale or None, "mscale_all_dim": c.rope_mscale_all_dim or None}
    length = int((c.rope_original_max_positions or 64) * c.rope_factor)
    windows = {"sliding_window": c.sliding_window}
    if family == "Qwen2":
        windows |= {"use_sliding_window": True, "max_window_layers": 0}
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_hidden_size,
        "hidden_act": {"swiglu": "silu", "geglu_tanh": "gelu_pytorch_tanh"}[c.activation],
        "rms_norm_eps": c.norm_eps,
        "layer_norm_eps": c.norm_eps,
        "max_position_embeddings": length,
        "rope_parameters": rope,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.linear_bias,
        "mlp_bias": c.linear_bias,
        "use_qkv_bias": c.qkv_bias,
        "pad_token_id": None,
        **windows,
    }


def seen_keys(mb: Microbatch, isolated: bool, window: int | None) -> Tensor:
    """[b, s, s]: which key each query sees; by documents where `isolated`."""
    index = torch.arange(SEQ)
    seen = (index[:, None] >= index).expand(BATCH, SEQ, SEQ)
    if isolated:
        document = (mb.positions == 0).cumsum(1)
        seen = seen & (document[:, :, None] == document[:, None, :])
    return seen if window is None else seen & (index[:, None] - index < window)


@functools.cache
def hf_reference(name: str, isolated: bool) -> tuple[Weights, float, Weights]:
    transformers = pytest.importorskip("transformers")
    family, options = FAMILIES[name]
    c = make_config(options, {}).model
    config = getattr(transformers, f"{family}Config")(**hf_config(family, c), attn_implementation="sdpa")
    model_class = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, model_class)(config).double().train()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(rms_norm, module)  # theirs computes in float32
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in parameters.items():
            norm = "norm" in key or "ln_" in key
            parameter.normal_(1.0 if norm and key.endswith("weight") else 0.0, 0.2, generator=generator)
    loss = torch.zeros((), dtype=torch.float64)
    for mb in batches(isolated):
        mask = None
        if isolated:  # without one, theirs makes the window's mask itself
            seen = seen_keys(mb, isolated, c.sliding_window)
            mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[:, None]
        logits = model(mb.tokens, attention_mask=mask, position_ids=mb.positions, use_cache=False).logits
        ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), mb.labels.flatten(), reduction="none")
        loss = loss + (ce * mb.loss_mask.flatten()).sum()
    loss.backward()

    def mapped(values: dict[str, Tensor | None]) -> Weights:
        assert None not in values.values()
        return {key: from_hf(values.__getitem__, key, c) for key in shapes(c)}

    weights = mapped({key: p.detach() for key, p in parameters.items()})
    return weights, loss.item(), mapped({key: p.grad for key, p in parameters.items()})


@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "sp": True, "pp": 2}], ids=["tp1", "tp2-sp-pp2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, parallel: dict[str, Any]) -> None:
    for isolated in (False, True) if name in ("gpt2", "mistral") else (False,):
        weights, loss, grads = hf_reference(name, isolated)
        assert largest_error(make_config(FAMILIES[name][1], parallel), weights, isolated, loss, grads) <= TOLERANCE


# --- the covering set -----------------------------------------------------------------------------------------------

LEVERS: dict[str, tuple] = {
    "tp": (1, 2, 4),
    "sp": (False, True),
    "pp": (1, 2),
    "dp": (1, 2),
    "zero": (0, 1),
    "schedule": ("1f1b", "gpipe", "interleaved", "zb-h1"),
    "recompute": ("none", "selective", "full"),
    "isolated": (False, True),
    "label_smoothing": (0.0, 0.1),
    "dropout": (0.0, 0.3),
    "attention_dropout": (0.0, 0.2),
    "tie_embeddings": (False, True),
    "norm": ("rmsnorm", "layernorm"),
    "activation": ("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"),
    "position": ("rope", "learned"),
    "linear_bias": (False, True),
    "qkv_bias": (False, True),
    "qk_norm": (False, True),
    "rope_fraction": (1.0, 0.67),
    "rope_scaling": ("none", "linear", "llama3", "yarn"),
    "sliding_window": (None, 5),
}
PARALLEL = ("tp", "sp", "pp", "dp", "zero", "schedule", "recompute")
Case = dict[str, Any]


def valid(case: Case) -> bool:
    """Whether the levers named so far fit together; those not named yet can be chosen to fit."""
    if (case.get("sp") and case.get("tp") == 1) or (case.get("zero") and case.get("dp") == 1):
        return False
    rotary = case.get("rope_fraction", 1.0) != 1.0 or case.get("rope_scaling", "none") != "none"
    return not (rotary and case.get("position") == "learned")


def pairs(case: Case) -> Iterator[tuple]:
    return itertools.combinations(case.items(), 2)


@functools.cache
def covering() -> tuple[Case, ...]:
    """Cases in which every valid pair of two levers' values occurs: each takes what is new in most pairs (greedy)."""
    rng = random.Random(0)
    todo = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(LEVERS, 2)
        for x in LEVERS[a]
        for y in LEVERS[b]
        if valid({a: x, b: y})
    }
    cases = []
    while todo:
        candidates = []
        for start in rng.sample(sorted(todo, key=str), min(len(todo), 20)):
            case = dict(start)
            for lever in rng.sample(list(LEVERS), len(LEVERS)):
                values = [v for v in LEVERS[lever] if valid(case | {lever: v})]
                if lever not in case:
                    gains = [sum(set(p) <= (case | {lever: v}).items() for p in todo) for v in values]
                    case[lever] = values[gains.index(max(gains))]
            candidates.append({lever: case[lever] for lever in LEVERS})
        best = max(candidates, key=lambda case: len(todo & set(pairs(case))))
        cases.append(best)
        todo -= set(pairs(best))
    return tuple(cases)


def label(case: Case) -> str:
    return "-".join(
        f"{lever}={value}" if not isinstance(value, bool) else lever
        for lever, value in case.items()
        if value != LEVERS[lever][0]
    )


def config_of(case: Case) -> Config:
    model = {lever: v for lever, v in case.items() if lever not in (*PARALLEL, "isolated", "label_smoothing")}
    model |= {"linear": {"rope_factor": 3.0}, "llama3": LLAMA3, "yarn": YARN}.get(case["rope_scaling"], {})
    parallel = {lever: case[lever] for lever in PARALLEL}
    if case["schedule"] == "interleaved":
        parallel["chunks"], model["num_layers"] = 2, 2 * case["pp"]
    return make_config(model, parallel, smoothing=case["label_smoothing"])


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


@pytest.mark.parametrize("case", covering(), ids=label)
def test_covering_set(case: Case) -> None:
    config = config_of(case)
    weights, loss, grads = formula_reference(config, case["isolated"])
    assert largest_error(config, weights, case["isolated"], loss, grads) <= TOLERANCE


def test_the_covering_set_covers() -> None:
    found = set(itertools.chain.from_iterable(pairs(case) for case in covering()))
    for a, b in itertools.combinations(LEVERS, 2):
        for x, y in itertools.product(LEVERS[a], LEVERS[b]):
            assert (((a, x), (b, y)) in found) == valid({a: x, b: y})
    assert len(covering()) <= 40
