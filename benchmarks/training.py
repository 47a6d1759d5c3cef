"""Tokens per second of training: megalite at several topologies, Hugging Face's Llama, and plain DDP, on this CPU.

    python benchmarks/training.py                       # both shapes, five rounds; writes results/training-cpu.md
    python benchmarks/training.py --rounds 1 --steps 1  # a smoke test; prints, writes nothing

Each contender runs in processes of its own, with the threads that a user would get: cores / ranks. All of them are
started at once and then wait; they train in turn within each round, so that other load on the machine hits them alike.
All start from the same weights, see the same batch, and do the same work: forward, backward, clipping, AdamW, in fp32.
Their losses are compared before any time is taken.
"""

import argparse
import ctypes
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "training-cpu.md"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

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


SHAPES = (
    Shape("small", 256, 8, 8, 4, 688, 32000, 256, 1, 8),
    Shape("very small", 64, 4, 4, 2, 176, 512, 64, 1, 8),
)


@dataclass(frozen=True)
class Contender:
    """`kind`: megalite, transformers, or ddp (torch's, around the transformers model)."""

    name: str
    kind: str
    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp


RIVAL = "transformers"
CONTENDERS = (
    Contender(RIVAL, RIVAL),
    Contender("torch DDP, dp 2", "ddp", dp=2),
    Contender("megalite, 1 process", "megalite"),
    Contender("megalite, dp 2", "megalite", dp=2),
    Contender("megalite, tp 2", "megalite", tp=2),
    Contender("megalite, pp 2", "megalite", pp=2),
    Contender("megalite, tp 2 x pp 2", "megalite", tp=2, pp=2),
)

Step = Callable[[], float]


# --- in a worker: one rank of one contender ---


def batch(shape: Shape) -> list[Any]:
    """The global batch, one tensor [b, s + 1] a microbatch."""
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
            # as train_step of megalite.run.trainer
            values = [*engine.forward_backward(microbatches).values(), engine.gradient_squares()]
            sums = engine.mesh.world.all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()
            engine.grads.flat.mul_(clip_scale(config.optim, sums[2], sums[1])[1])
            engine.optimizer.step(config.optim.lr)
            return float(sums[0] / sums[1])

        yield step


@contextmanager
def transformers_step(shape: Shape, contender: Contender) -> Iterator[Step]:
    """LlamaForCausalLM and torch's fused AdamW, as one writes it by hand; with DDP around it where dp > 1."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    from megalite.config import OptimConfig
    from megalite.model.decoder import Decoder
    from megalite.model.init import draw
    from megalite.model.layouts import to_hf

    model = model_config(shape)
    llama = LlamaForCausalLM(
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
    assert llama.config._attn_implementation == "sdpa"
    llama.load_state_dict(weights)
    llama.train()

    c = OptimConfig()
    groups = [
        {"params": [p for p in llama.parameters() if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in llama.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
    replica = 0
    net: Any = llama
    if contender.dp > 1:
        dist.init_process_group("gloo")
        replica, net = dist.get_rank(), DistributedDataParallel(llama)
    mine = batch(shape)[replica :: contender.dp]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for number, row in enumerate(mine):
            last = number == len(mine) - 1
            with ExitStack() as stack:
                if contender.dp > 1 and not last:
                    stack.enter_context(net.no_sync())
                # every microbatch has as many tokens: a mean of means is right here
                loss = net(input_ids=row[:, :-1], labels=row[:, :-1], shift_labels=row[:, 1:]).loss / len(mine)
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), c.clip_grad, foreach=True)
        optimizer.step()
        if contender.dp > 1:
            shared = torch.as_tensor(total) / contender.dp
            dist.all_reduce(shared)
            total = float(shared)
        return float(total)

    yield step
    if contender.dp > 1:
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """What megalite does at start-up, done for the others too: glibc keeps large freed blocks."""
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((-4, 0), (-1, -1), (-2, 256 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        libc.mallopt(option, value)


def work(shape: Shape, contender: Contender) -> None:
    """Obey the parent: each number on stdin is so many steps; answer with seconds and the last loss."""
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // contender.ranks))
    keep_freed_memory()
    make = megalite_step if contender.kind == "megalite" else transformers_step
    with make(shape, contender) as step:
        print("ready", flush=True)
        for line in sys.stdin:
            began, loss = time.perf_counter(), 0.0
            for _ in range(int(line)):
                loss = step()
            print(json.dumps([time.perf_counter() - began, loss]), flush=True)


# --- in the parent: all contenders in turn ---


class Run:
    """The processes of one contender, idle until told to train."""

    def __init__(self, shape: Shape, contender: Contender) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        told = json.dumps([asdict(shape), asdict(contender)])
        shared = {"WORLD_SIZE": contender.ranks, "LOCAL_WORLD_SIZE": contender.ranks, "MASTER_PORT": port}
        self.contender, self.processes = contender, []
        for rank in range(contender.ranks):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": ROOT}
            environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
            environment |= {key: str(value) for key, value in own.items()}
            command = [sys.executable, __file__, "--work", told]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))  # type: ignore[call-overload]
        self._answers("ready")

    def _answers(self, expected: str = "") -> list[str]:
        answers = [process.stdout.readline().strip() for process in self.processes]
        if not all(answers) or (expected and set(answers) != {expected}):
            self.end()
            sys.exit(f"error: {self.contender.name} failed; its own words stand above")
        return answers

    def train(self, steps: int) -> tuple[float, float]:
        """(seconds of the slowest rank, last loss)."""
        for process in self.processes:
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        answers = [json.loads(answer) for answer in self._answers()]
        return max(seconds for seconds, _ in answers), answers[0][1]

    def end(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(shape: Shape, rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens per second of every round by contender, after one step of warm-up."""
    with ExitStack() as stack:
        runs = []
        for contender in CONTENDERS:
            runs.append(Run(shape, contender))
            stack.callback(runs[-1].end)
        losses = {run.contender.name: run.train(2)[1] for run in runs}
        # the second loss has seen one update
        apart = {name: abs(loss - losses[RIVAL]) / losses[RIVAL] for name, loss in losses.items()}
        print(f"{shape.name}: second loss {losses[RIVAL]:.6f}, at most {max(apart.values()):.0e} apart", flush=True)
        if max(apart.values()) > 1e-4:
            sys.exit(f"error: the contenders do not train the same model: {losses}")
        speeds: dict[str, list[float]] = {run.contender.name: [] for run in runs}
        for number in range(rounds):
            for run in runs:
                seconds, _ = run.train(steps)
                speeds[run.contender.name].append(steps * shape.tokens / seconds)
            print(f"{shape.name}: round {number + 1} of {rounds} done", flush=True)
        return speeds


def table(speeds: dict[str, list[float]], cores: int) -> list[str]:
    """Markdown rows; the ratio is the median of the rounds' own ratios."""
    rows = [
        f"| contender | ranks x threads | tokens/s | / {RIVAL} |",
        "|---|---|---|---|",
    ]
    for contender in CONTENDERS:
        found = speeds[contender.name]
        ratios = [a / b for a, b in zip(found, speeds[RIVAL])]
        cells = [
            contender.name,
            f"{contender.ranks} x {max(1, cores // contender.ranks)}",
            f"{statistics.median(found):,.0f} [{min(found):,.0f}–{max(found):,.0f}]",
            f"{statistics.median(ratios):.2f} [{min(ratios):.2f}–{max(ratios):.2f}]",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report(shapes: Sequence[Shape], rounds: int, steps: int) -> str:
    from importlib.metadata import version

    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        "# Training on a CPU",
        "",
        f"Tokens per second, fp32: median of {rounds} interleaved rounds of {steps} steps [slowest–fastest], and",
        f"the ratio to {RIVAL} round by round. {machine()}, {cores} cores, load {load:.1f} at the start, {versions}.",
        "Made by `benchmarks/training.py`.",
        "",
        "A rank has cores / ranks threads, at least one; where ranks are more than cores, they take turns on a core.",
    ]
    for shape in shapes:
        rows = table(measure(shape, rounds, steps), cores)
        print("\n".join(rows), flush=True)
        lines += [
            "",
            f"## {shape.name.capitalize()}",
            "",
            f"hidden {shape.hidden}, {shape.layers} layers, {shape.heads} heads, {shape.kv_heads} kv heads, "
            f"ffn {shape.ffn}, vocabulary {shape.vocab}, sequence {shape.seq}, "
            f"{shape.microbatches} microbatches of {shape.micro_batch}.",
            "",
            *rows,
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of one contender in one round")
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shape", choices=names, help="only this one; then nothing is written without --output")
    parser.add_argument(
        "--output", type=Path, help="default for all shapes in five rounds or more: results/training-cpu.md"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        shape, contender = json.loads(args.work)
        work(Shape(**shape), Contender(**contender))
        return
    text = report([shape for shape in SHAPES if args.shape in (None, shape.name)], args.rounds, args.steps)
    output = args.output or (RESULTS if args.rounds >= 5 and args.shape is None else None)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
