"""What a stage keeps alive, in the allocator's bytes: GPipe keeps every microbatch, 1F1B as many as stages follow."""

import json
from pathlib import Path

import torch
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile

from megalite.config import Config, ModelConfig, ParallelConfig, TrainConfig, resolve
from megalite.engine.batches import Microbatch
from megalite.engine.engine import Engine, build
from megalite.pipeline.schedule import make_plan
from megalite.pipeline.simulate import simulate
from megalite.run.world import start_world

STAGES, MICROBATCHES = 4, 8


def configuration(schedule: str) -> Config:
    return resolve(
        Config(
            model=ModelConfig(vocab_size=256, hidden_size=128, num_layers=8, num_heads=4, ffn_hidden_size=352),
            parallel=ParallelConfig(tp=1, pp=STAGES, schedule=schedule, stages=(2, 2, 2, 2)),
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
        peaks = {m: peak_bytes(engine, microbatches[:m]) for m in (1, 2, MICROBATCHES)}
        Path(folder, f"{schedule}-{world.rank}.json").write_text(json.dumps(peaks))
    return 0


def test_peak_activation_bytes_are_the_simulations(tmp_path: Path):
    peaks: dict[str, list[dict[str, int]]] = {}
    for schedule in ("gpipe", "1f1b"):
        run_ranks(STAGES, measure, schedule, str(tmp_path))
        peaks[schedule] = [json.loads((tmp_path / f"{schedule}-{rank}.json").read_text()) for rank in range(STAGES)]
    print(f"\n{'':6} rank   microbatches kept   predicted MiB   measured MiB   ratio")
    for schedule, by_rank in peaks.items():
        kept = simulate(make_plan(schedule, STAGES, MICROBATCHES)).peak_live
        for rank in range(STAGES):
            one = peaks["gpipe"][rank]["2"] - peaks["gpipe"][rank]["1"]
            predicted = peaks["gpipe"][rank]["1"] + (kept[rank] - 1) * one
            measured = by_rank[rank][str(MICROBATCHES)]
            print(
                f"{schedule:6} {rank:4} {kept[rank]:19} {predicted / 2**20:15.1f} {measured / 2**20:14.1f} "
                f"{measured / predicted:7.3f}"
            )
            assert abs(measured / predicted - 1) < 0.1
    first = [peaks[schedule][0][str(MICROBATCHES)] for schedule in ("gpipe", "1f1b")]
    assert first[0] > 1.7 * first[1]
