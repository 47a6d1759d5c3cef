"""docs/img/numbers.png: losses and weights of two ranks compared with one process, by training."""

from __future__ import annotations

from typing import Any

from drawing import COLLECTIVE, RANKS
from matplotlib.figure import Figure


def _train(axis: str, tied: bool, steps: int) -> list[tuple[float, Any]]:
    """Loss and whole weights after each step of a small fp32 model; two ranks on `axis`, or one for ''."""
    import torch

    from megalite.config import Config, ModelConfig, ParallelConfig, TrainConfig, resolve
    from megalite.engine.batches import Microbatch
    from megalite.engine.engine import build
    from megalite.optim.adamw import clip_scale
    from megalite.parallel.groups import World
    from megalite.parallel.threads import run_threads

    torch.set_num_threads(1)
    b, s, vocab, count = 2, 32, 128, 4
    model = ModelConfig(vocab_size=vocab, hidden_size=64, num_layers=2, ffn_hidden_size=176, tie_embeddings=tied)
    tp, pp, dp = (2 if name == axis else 1 for name in ("tp", "pp", "dp"))
    train = TrainConfig(seq_len=s, micro_batch_size=b, global_batch_size=b * count)
    config = resolve(Config(model, ParallelConfig(tp=tp, pp=pp, dp=dp), train=train), tp * pp * dp)
    # the ranks are threads: each writes its own rows into one whole model
    whole: list[dict[str, torch.Tensor]] = [{} for _ in range(steps)]

    def main(world: World) -> list[float]:
        engine = build(config, world)
        replica, losses = engine.mesh.dp, []
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            # every sample says its first half twice: something to learn
            tokens = torch.randint(vocab, (count * b, s // 2), generator=generator).repeat(1, 3)[:, : s + 1]
            mask, positions = torch.ones(b, s), torch.arange(s).expand(b, s)
            rows = tokens.split(b)[replica.rank :: replica.size]
            batch = [Microbatch(row[:, :-1], row[:, 1:], mask, positions) for row in rows]
            values = [*engine.forward_backward(batch).values(), engine.gradient_squares()]
            loss, valid, squares = engine.mesh.world.all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()
            engine.update(1e-3, clip_scale(config.optim, squares, valid)[1])
            losses.append(loss / valid)
            for name in engine.parameters:
                shard = engine.shards[name]
                place = whole[step].setdefault(name, torch.zeros(shard.whole_shape))
                shard.put(engine.parameters[name].detach(), place)
        return losses

    return list(zip(run_threads(tp * pp * dp, main)[0], whole))


def numbers() -> Figure:
    """How far two ranks stray from one process over 50 fp32 steps: the loss, and the weights."""
    steps, bottom = 50, 1e-9
    figure = Figure(figsize=(9.0, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    alone = {tied: _train("", tied, steps) for tied in (False, True)}
    cases = [
        ("tp", False, "tp 2 with sp", RANKS[0]),
        ("dp", False, "dp 2", RANKS[1]),
        ("pp", True, "pp 2, tied embeddings", "#8a6bbf"),
        ("pp", False, "pp 2: equal in every bit", "#4f9a3d"),
    ]
    for axis, tied, label, colour in cases:
        losses, weights = [], []
        for (loss, tensors), (whole_loss, whole) in zip(_train(axis, tied, steps), alone[tied]):
            losses.append(abs(loss - whole_loss) / whole_loss)
            weights.append(max(float((tensors[n] - w).abs().max() / w.abs().max()) for n, w in whole.items()))
        assert axis != "pp" or tied or max(losses + weights) == 0
        print(f"{label}: losses {max(losses):.1e}, weights {max(weights):.1e}")
        for axes, values in ((left, losses), (right, weights)):
            shown = [max(x, bottom) for x in values]
            axes.plot(range(1, steps + 1), shown, ".-", color=colour, label=label, linewidth=0.8, markersize=4)
    left.axhline(1e-5, color=COLLECTIVE, linewidth=1.2)
    left.text(1, 1.25e-5, "promised for tp, sp, dp: 1e-5", color=COLLECTIVE, fontsize=8.5)
    left.set(yscale="log", ylim=(bottom * 0.6, 1e-4))
    left.set_yticks([bottom, *(10.0**-k for k in range(8, 3, -1))], ["0", *(f"1e-{k}" for k in range(8, 3, -1))])
    left.minorticks_off()
    for axes, title in ((left, "loss"), (right, "weights: the worst element of any tensor")):
        axes.set(xlim=(0, steps + 1), xlabel="step of AdamW in fp32")
        axes.set_title(title, loc="left", fontsize=9.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.suptitle("relative difference from one process", fontsize=10)
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=len(cases))
    return figure
