"""The contenders of training.py: one rank of megalite, of Hugging Face's Llama, or of DDP around it.

training.py starts this file, once per rank, with a shape and a contender as JSON, and writes numbers of steps to stdin.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model and its global batch."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq: int
    micro_batch: int
    microbatches: int

    @property
    def tokens(self) -> int:
        return self.seq * self.micro_batch * self.microbatches


@dataclass(frozen=True)
class Contender:
    """A program and its topology. `kind`: megalite, transformers, or ddp (torch's, around the transformers model)."""

    name: str
    kind: str
    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp


Step = Callable[[], float]


def batch(shape: Shape) -> list[Any]:
    """The global batch, one tensor [b, s + 1] per microbatch."""
    import torch

    generator = torch.Generator().manual_seed(1)
    size = (shape.microbatches, shape.micro_batch, shape.seq + 1)
    return list(torch.randint(shape.vocab, size, generator=generator))


def model_config(shape: Shape) -> Any:
    from megalite.config import ModelConfig

    return ModelConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        ffn_hidden_size=shape.ffn,
    )


@contextmanager
def megalite_step(shape: Shape, contender: Contender) -> Iterator[Step]:
    """A training step of megalite."""
    import torch

    from megalite.config import Config, ParallelConfig, TrainConfig, check, resolve
    from megalite.engine.batches import Microbatch
    from megalite.engine.engine import build
    from megalite.optim.adamw import clip_scale
    from megalite.run.world import start_world

    parallel = ParallelConfig(tp=contender.tp, pp=contender.pp, dp=contender.dp)
    size = shape.micro_batch * shape.microbatches
    train = TrainConfig(device="cpu", seq_len=shape.seq, micro_batch_size=shape.micro_batch, global_batch_size=size)
    config = resolve(Config(model_config(shape), parallel, train=train), contender.ranks)
    check(config, contender.ranks)
    with start_world(config) as world:
        engine = build(config, world)
        dp = engine.mesh.dp
        mask = torch.ones(shape.micro_batch, shape.seq)
        positions = torch.arange(shape.seq).expand(shape.micro_batch, -1)
        rows = batch(shape)[dp.rank :: dp.size]
        microbatches = [Microbatch(row[:, :-1], row[:, 1:], mask, positions) for row in rows]

        def step() -> float:
            # as in megalite's trainer
            values = [*engine.forward_backward(microbatches).values(), engine.gradient_squares()]
            sums = engine.mesh.world.all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()
            engine.grads.flat.mul_(clip_scale(config.optim, sums[2], sums[1])[1])
            engine.optimizer.step(config.optim.lr)
            return float(sums[0] / sums[1])

        yield step


def llama(shape: Shape) -> Any:
    """Hugging Face's Llama with the weights that megalite draws for this shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megalite.model.decoder import Decoder
    from megalite.model.init import draw
    from megalite.model.layouts import to_hf

    model = model_config(shape)
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=model.norm_eps,
            max_position_embeddings=shape.seq,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    with torch.device("meta"):
        plain = dict(Decoder(model, range(model.num_layers)).named_parameters())
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in plain.items():
        weights |= to_hf(name, draw(name, tuple(parameter.shape), model, 1234), model)
    assert net.config._attn_implementation == "sdpa"
    net.load_state_dict(weights)
    net.train()
    return net


@contextmanager
def transformers_step(shape: Shape, contender: Contender) -> Iterator[Step]:
    """LlamaForCausalLM and torch's fused AdamW as one writes it by hand; inside DDP if dp > 1."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from megalite.config import OptimConfig

    c, model = OptimConfig(), llama(shape)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
    replica = 0
    net: Any = model
    if contender.dp > 1:
        dist.init_process_group("gloo")
        replica, net = dist.get_rank(), DistributedDataParallel(model)
    mine = batch(shape)[replica :: contender.dp]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for number, row in enumerate(mine):
            last = number == len(mine) - 1
            with net.no_sync() if contender.dp > 1 and not last else nullcontext():
                # every microbatch has the same number of tokens, so a mean of means is correct here
                loss = net(input_ids=row[:, :-1], labels=row[:, :-1], shift_labels=row[:, 1:]).loss / len(mine)
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_grad, foreach=True)
        optimizer.step()
        if contender.dp > 1:
            shared = torch.as_tensor(total) / contender.dp
            dist.all_reduce(shared)
            total = float(shared)
        return float(total)

    yield step
    if contender.dp > 1:
        dist.destroy_process_group()


def work(shape: Shape, contender: Contender) -> None:
    """Read numbers of steps from stdin; after each, print the seconds taken and the last loss as JSON."""
    import torch

    from megalite.run.world import keep_freed_memory

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // contender.ranks))
    keep_freed_memory()  # megalite does so at start-up; here for all contenders
    make = megalite_step if contender.kind == "megalite" else transformers_step
    with make(shape, contender) as step:
        print("ready", flush=True)
        for line in sys.stdin:
            began, loss = time.perf_counter(), 0.0
            for _ in range(int(line)):
                loss = step()
            print(json.dumps([time.perf_counter() - began, loss]), flush=True)


if __name__ == "__main__":
    shape, contender = json.loads(sys.argv[1])
    work(Shape(**shape), Contender(**contender))
