"""Cut embedding and cross entropy against torch's own, forward and gradients, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.parallel.cuts import Shard, padded
from megalite.parallel.groups import Group
from megalite.parallel.threads import run_threads
from megalite.parallel.vocab import VocabCrossEntropy, VocabEmbedding

B, S, H, VOCAB = 2, 12, 6, 101
TP = pytest.mark.parametrize("tp", [2, 3, 4])
SP = pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])


def on_tp(size: int, main: Callable[[Group], object]) -> list:
    return run_threads(size, lambda world: main(world.split([list(range(size))])))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def rows(x: Tensor, group: Group, sp: bool) -> Tensor:
    """This rank's part of a sequence under sp, else all of it."""
    return x.chunk(group.size, 1)[group.rank] if sp else x


def embedding(weight: Tensor, group: Group, sp: bool, shard: Shard) -> VocabEmbedding:
    return VocabEmbedding(nn.Embedding.from_pretrained(shard.cut(weight), freeze=False), group, sp, shard)


def vocab_shard(tp: int, rank: int) -> Shard:
    return padded((VOCAB, H), tp, rank)


def cut_columns(logits: Tensor, tp: int, rank: int, padding: float) -> Tensor:
    """This rank's columns of logits [b, s, vocab], with a value in the padding that must not matter."""
    share = -(-VOCAB // tp)
    return F.pad(logits, (0, share * tp - VOCAB), value=padding)[..., rank * share :][..., :share].clone()


LABELS = torch.randint(0, VOCAB, (B, S), generator=torch.Generator().manual_seed(3))
# both ends of every rank's rows for each tp
LABELS[0] = torch.tensor([0, 25, 26, 33, 34, 50, 51, 52, 67, 68, 78, 100])
MASK = (randn(B, S, seed=4) > 0).double()


def plain_loss(logits: Tensor) -> Tensor:
    ce = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="none").view(B, S)
    return (ce * MASK).sum()


@TP
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["usual", "extreme"])
def test_cross_entropy(tp: int, scale: float) -> None:
    logits = randn(B, S, VOCAB) if scale == 1 else randn(B, S, VOCAB).sign() * scale
    whole = logits.clone().requires_grad_()
    expected = plain_loss(whole)
    (3 * expected).backward()
    assert whole.grad is not None

    def main(group: Group) -> tuple[Tensor, Tensor]:
        local = cut_columns(logits, tp, group.rank, padding=1e5).requires_grad_()
        before, labels, mask = local.detach().clone(), LABELS.clone(), MASK.clone()
        loss = VocabCrossEntropy(group, vocab_shard(tp, group.rank))(local, labels, mask)
        close(loss, expected)
        (3 * loss).backward()
        # nothing is written over what the caller gave
        assert torch.equal(local, before)
        assert torch.equal(labels, LABELS)
        assert torch.equal(mask, MASK)
        return local.grad

    grads = torch.cat(on_tp(tp, main), -1)
    assert bool(grads.isfinite().all())
    close(grads[..., :VOCAB], whole.grad)
    assert not grads[..., VOCAB:].any()


@TP
def test_cross_entropy_gradient_is_the_slope_of_the_loss(tp: int) -> None:
    """By central differences along random directions: no reference but the forward itself."""
    logits, step = randn(B, S, VOCAB), 1e-5

    def main(group: Group) -> list[tuple[float, Tensor]]:
        head = VocabCrossEntropy(group, vocab_shard(tp, group.rank))
        local = cut_columns(logits, tp, group.rank, 0.0).requires_grad_()
        head(local, LABELS, MASK).backward()
        found = []
        for seed in (1, 2, 3):
            v = cut_columns(randn(B, S, VOCAB, seed=seed), tp, group.rank, 0.0)
            up, down = (head(local.detach() + sign * step * v, LABELS, MASK) for sign in (1, -1))
            found.append((((up - down) / (2 * step)).item(), (local.grad * v).sum()))
        return found

    for of_ranks in zip(*on_tp(tp, main)):
        slope = sum(dot.item() for _, dot in of_ranks)
        assert all(abs(difference - slope) < 1e-7 * max(1, abs(slope)) for difference, _ in of_ranks)


@TP
def test_cross_entropy_of_half_precision_is_taken_in_fp32(tp: int) -> None:
    logits = randn(B, S, VOCAB).bfloat16()
    whole = logits.double().requires_grad_()
    expected = plain_loss(whole)
    expected.backward()

    def main(group: Group) -> Tensor:
        local = cut_columns(logits, tp, group.rank, padding=0.0).requires_grad_()
        loss = VocabCrossEntropy(group, vocab_shard(tp, group.rank))(local, LABELS, MASK)
        assert loss.dtype == torch.promote_types(torch.float32, MASK.dtype)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        loss.backward()
        assert local.grad.dtype == torch.bfloat16
        return local.grad

    grads = torch.cat(on_tp(tp, main), -1)[..., :VOCAB]
    torch.testing.assert_close(grads, whole.grad.bfloat16(), rtol=2**-7, atol=1e-6)


@TP
def test_whole_logits_without_padding(tp: int) -> None:
    logits = randn(B, S, VOCAB)

    def main(group: Group) -> Tensor:
        return VocabCrossEntropy(group, vocab_shard(tp, group.rank)).whole(cut_columns(logits, tp, group.rank, 9.0))

    assert all(torch.equal(whole, logits) for whole in on_tp(tp, main))


def test_a_rank_may_have_no_row_of_the_vocabulary() -> None:
    """5 rows on 4 ranks: two each, the last rank has padding alone."""
    logits, labels = randn(B, S, 5), LABELS % 5
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    weight = randn(5, H)

    def main(group: Group) -> Tensor:
        shard = padded((5, H), 4, group.rank)
        local = F.pad(logits, (0, 3))[..., 2 * group.rank :][..., :2].clone().requires_grad_()
        loss = VocabCrossEntropy(group, shard)(local, labels, torch.ones(B, S))
        close(loss, expected)
        loss.backward()
        assert torch.equal(embedding(weight, group, False, shard)(labels), F.embedding(labels, weight))
        return local.grad

    close(torch.cat(on_tp(4, main), -1)[..., :5], whole.grad)


@TP
@SP
def test_embedding(tp: int, sp: bool) -> None:
    weight, out = randn(VOCAB, H), randn(B, S, H, seed=9)
    whole = weight.clone().requires_grad_()
    expected = F.embedding(LABELS, whole)
    (expected * out).sum().backward()

    def main(group: Group) -> None:
        shard = vocab_shard(tp, group.rank)
        module = embedding(weight, group, sp, shard)
        y = module(LABELS)
        assert torch.equal(y, rows(expected, group, sp))  # a sum with zeros: to the bit
        (y * rows(out, group, sp)).sum().backward()
        close(module.weight.grad, shard.cut(whole.grad))

    on_tp(tp, main)
