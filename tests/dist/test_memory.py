"""What a rank keeps alive under each schedule, in the allocator's bytes, against what its list of actions says."""

import json
from pathlib import Path

import torch
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile

from megalite.config import Config, ModelConfig, ParallelConfig, TrainConfig, resolve
from megalite.config.schedules import SCHEDULES
from megalite.engine.batches import Microbatch
from megalite.engine.engine import Engine, build
from megalite.pipeline.schedule import make_plan
from megalite.pipeline.simulate import live_counts
from megalite.plan.activations import deferred_bytes
from megalite.run.world import start_world

STAGES, MICROBATCHES = 4, 8


def configuration(schedule: str) -> Config:
    chunks = 2 if schedule == "interleaved" else 1
    stages = (2 // chunks,) * STAGES * chunks
    return resolve(
        Config(
            model=ModelConfig(vocab_size=256, hidden_size=128, num_layers=8, num_heads=4, ffn_hidden_size=352),
            parallel=ParallelConfig(tp=1, pp=STAGES, schedule=schedule, chunks=chunks, stages=stages),
            train=TrainConfig(seq_len=256, micro_batch_size=2, global_batch_size=2 * MICROBATCHES, device="cpu"),
        ),
        STAGES,
    )


def peak_bytes(engine: Engine, microbatches: list[Microbatch]) -> int:
    """The most bytes that one forward and backward had allocated at a time, beyond what was there before it."""
    engine.forward_backward(microbatches)  # what is made once and kept is no activation
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine.forward_backward(microbatches)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def measure(schedule: str, folder: str) -> int:
    config = configuration(schedule)
    with start_world(config) as world:
        engine = build(config, world)
        tokens = torch.randint(0, 256, (2, 257), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(256).expand(2, 256)
        microbatches = [
            Microbatch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 256), positions) for _ in range(MICROBATCHES)
        ]
        # of one and of two microbatches kept: the difference is what one keeps, the rest is passing
        sizes = (1, 2, MICROBATCHES) if schedule == "gpipe" else (MICROBATCHES,)
        peaks = {m: peak_bytes(engine, microbatches[:m]) for m in sizes}
        Path(folder, f"{schedule}-{world.rank}.json").write_text(json.dumps(peaks))
    return 0


def test_peak_activation_bytes_are_the_simulations(tmp_path: Path):
    peaks: dict[str, list[dict[str, int]]] = {}
    for schedule in SCHEDULES:
        run_ranks(STAGES, measure, schedule, str(tmp_path))
        peaks[schedule] = [json.loads((tmp_path / f"{schedule}-{rank}.json").read_text()) for rank in range(STAGES)]
    print(f"\n{'':11} rank   kept   predicted MiB   measured MiB   ratio")
    for schedule, by_rank in peaks.items():
        config = configuration(schedule)
        plan = make_plan(schedule, STAGES, MICROBATCHES, config.parallel.chunks)
        for rank in range(STAGES):
            # of a chunk a part of it; between I and W what the weight gradients need
            one = peaks["gpipe"][rank]["2"] - peaks["gpipe"][rank]["1"]
            waiting = deferred_bytes(config, 2, last=rank == STAGES - 1)
            kept = max(
                sum(whole) * one / config.parallel.chunks + sum(deferred) * waiting
                for whole, deferred in live_counts(plan[rank])
            )
            predicted = peaks["gpipe"][rank]["1"] + kept - one
            measured = by_rank[rank][str(MICROBATCHES)]
            print(
                f"{schedule:11} {rank:4} {kept / one:6.2f} {predicted / 2**20:15.1f} {measured / 2**20:14.1f} "
                f"{measured / predicted:7.3f}"
            )
            assert abs(measured / predicted - 1) < 0.1
    first = [peaks[schedule][0][str(MICROBATCHES)] for schedule in ("gpipe", "1f1b")]
    assert first[0] > 1.7 * first[1]
