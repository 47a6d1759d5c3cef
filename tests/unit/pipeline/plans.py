"""Small plans of every schedule, and how tests read and write them."""

from collections.abc import Callable
from functools import partial

from megalite.pipeline.schedule import Action, Plan, forward_only, gpipe, interleaved, one_f_one_b, zb_h1
from megalite.pipeline.simulate import Costs, simulate

# those whose bubble is 1F1B's
PLAIN: dict[str, Callable[[int, int], Plan]] = {"gpipe": gpipe, "1f1b": one_f_one_b, "forward_only": forward_only}
EVERY: dict[str, Callable[[int, int], Plan]] = {
    **PLAIN,
    "zb-h1": zb_h1,
    **{f"interleaved-{v}": partial(interleaved, chunks=v) for v in (2, 3, 4)},
}


def fitting(name: str, p: int, m: int) -> int:
    """`m`, or the next number of microbatches that the schedule runs on p ranks."""
    return -(-m // p) * p if name.startswith("interleaved") else m


def idle_times(plan: Plan, costs: Costs) -> list[float]:
    played = simulate(plan, costs)
    return [played.makespan - sum(e.end - e.start for e in timeline) for timeline in played.timelines]


def parse(text: str) -> list[Action]:
    """`0F1 0B1 0REDUCE` as actions."""
    actions = []
    for word in text.split():
        op = word.lstrip("0123456789").rstrip("0123456789")
        stage, microbatch = word.split(op)
        actions.append(Action(int(stage), op, int(microbatch or -1)))
    return actions


def written(plan: Plan) -> list[str]:
    return [" ".join(map(str, actions)) for actions in plan]
