"""The executor keeps what the simulation says, releases what it sent, and computes what one process would."""

import pytest
import torch
from stages import TRAINING, Chunk, Rank, play, tokens, weight

from megalite.pipeline.executor import execute
from megalite.pipeline.schedule import Action, make_plan
from megalite.pipeline.simulate import simulate

EVERY = [*TRAINING, ("forward_only", 1), ("forward_only", 2)]


def sizes(p: int, v: int, most: int = 8) -> range:
    """Numbers of microbatches that the schedule takes."""
    return range(p if v > 1 else 1, most + 1, p if v > 1 else 1)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize(("schedule", "v"), TRAINING)
def test_live_activations_are_those_of_the_simulation(schedule: str, v: int, p: int) -> None:
    for m in sizes(p, v):
        ranks = play(schedule, p, m, v)
        peaks = simulate(make_plan(schedule, p, m, v)).peak_live
        assert [max(inputs for _, inputs in rank.live) for rank in ranks] == peaks, (p, m)
        for rank in ranks:
            assert rank.live[-1] == (0, 0)
            assert rank.done == rank.actions
            # after every action, not at the peak alone; the graph is gone with the input gradient
            ops = [[action.op for action in rank.done[: i + 1]] for i in range(len(rank.done))]
            graphs = [o.count("F") - o.count("B") - o.count("I") for o in ops]
            inputs = [o.count("F") - o.count("B") - o.count("W") for o in ops]
            assert rank.live == list(zip(graphs, inputs))


class Outputs(Rank):
    """A rank that looks where the tensors it gave away are."""

    def look(self) -> None:
        # the tensor with a graph behind it is gone with its forward; its gradient edge is enough
        assert all(ref() is None for chunk in self.chunks.values() for ref in chunk.out.values())
        # what travels is held until the next one travels to the same rank
        for peer in {peer for peer, _ in self.link.sent}:
            held = [ref() is not None for to, ref in self.link.sent if to == peer]
            assert not any(held[:-1])
        for chunk in self.chunks.values():
            if not chunk.last and len(self.ranks) > 1:
                under_way = [not storage.expired() for storage in chunk.storage.values()]
                assert sum(under_way) <= 2  # the last one sent, and one whose SEND is the next action
                action = self.done[-1]
                if under_way and (action.stage, action.op, action.of) == (chunk.stage, "SEND", "F"):
                    assert under_way == [False] * (len(under_way) - 1) + [True]


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 6), (4, 8)])
@pytest.mark.parametrize(("schedule", "v"), TRAINING)
def test_outputs_are_freed_after_their_send(schedule: str, v: int, p: int, m: int) -> None:
    for rank in play(schedule, p, m, v, Outputs):
        # nothing is held once the list is done
        assert all(ref() is None for _, ref in rank.link.sent)
        for chunk in rank.chunks.values():
            assert len(chunk.out) == m
            assert chunk.last or all(storage.expired() for storage in chunk.storage.values())


class Sent(Rank):
    """Notes whether an output's memory is free when its own backward has come to its turn."""

    free_at_backward: dict[int, bool]

    def began(self, action: Action) -> None:
        if str(action) == f"{self.rank}B0":
            self.free_at_backward = {m: x.expired() for m, x in self.chunks[self.rank].storage.items()}


def test_a_sent_outputs_memory_is_free_before_its_backward() -> None:
    """GPipe on two ranks: when the first backward starts, of four outputs only the last one sent is held."""
    first = play("gpipe", 2, 4, 1, Sent)[0]
    assert first.free_at_backward == {0: True, 1: True, 2: True, 3: False}


@pytest.mark.parametrize(("schedule", "v"), EVERY)
def test_every_send_is_waited_for_before_the_next_to_the_same_rank(schedule: str, v: int) -> None:
    for rank in play(schedule, 3, 6, v):
        sends = [action.peer for action in rank.actions if action.op == "SEND"]
        assert rank.link.log == {peer: ["send", "wait"] * sends.count(peer) for peer in sends}


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("v", [1, 2])
def test_forward_only_keeps_nothing(v: int, p: int) -> None:
    for rank in play("forward_only", p, 5, v):
        assert {graph for graph, _ in rank.live} == {0}
        assert all(ref() is None for chunk in rank.chunks.values() for ref in chunk.out.values())
        assert rank.reduced == []
        assert len(rank.results) == (5 if rank.last else 0)
        assert not any(x.requires_grad for result in rank.results for x in result.values())


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize(("schedule", "v"), TRAINING)
def test_results_and_gradients_are_those_of_one_process(schedule: str, v: int, p: int) -> None:
    weights, m = [weight(stage).requires_grad_() for stage in range(p * v)], 2 * p
    losses = []
    for number in range(m):
        x = tokens(number)
        for w in weights:
            x = (x @ w).sin() + 1
        losses.append(x.sum().detach())
        x.sum().backward()
    ranks = play(schedule, p, m, v)
    assert [len(rank.results) for rank in ranks] == [0] * (p - 1) + [m]
    assert [result.keys() for result in ranks[-1].results] == [{"loss", "largest"}] * m
    assert all(torch.equal(result["loss"], loss) for result, loss in zip(ranks[-1].results, losses))
    assert not any(x.requires_grad for result in ranks[-1].results for x in result.values())
    # every schedule sums the microbatches in the same order, so to the bit
    for rank in ranks:
        assert all(torch.equal(chunk.weight.grad, weights[s].grad) for s, chunk in rank.chunks.items())
        assert sorted(rank.reduced) == list(rank.chunks)
    for rank in play("forward_only", p, m, v)[-1:]:
        assert all(torch.equal(result["loss"], loss) for result, loss in zip(rank.results, losses))


def test_an_action_it_does_not_know_is_refused() -> None:
    with pytest.raises(AssertionError, match="cannot run 0X0"):
        execute([Action(0, "X", 0)], {0: Chunk(0, 1, True)}, link=None, ranks=[0], training=True)
