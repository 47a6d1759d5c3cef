import pytest
import torch

from megalite.ops import causal_softmax, causal_softmax_reference

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}
# Odd sizes leave a tail after the vectorised part; 3x70 is decoding with a cache.
CHECKS = ("test_schema", "test_faketensor")
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 5), (1, 2, 37, 37), (2, 2, 3, 70), (1, 4, 129, 200), (2, 1, 64, 64)]


def backward(fn, x, grad):
    x = x.detach().requires_grad_()
    out = fn(x)
    out.backward(grad)
    return out.detach(), x.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    torch.manual_seed(0)
    x = (4 * torch.randn(shape, device=device)).to(dtype)
    grad = torch.randn(shape, device=device).to(dtype)
    before = x.clone(), grad.clone()
    probs, dx = backward(lambda s: causal_softmax(s, 0.3, "fused"), x, grad)
    assert torch.equal(x, before[0])
    assert torch.equal(grad, before[1])
    # The reference runs in double on the same rounded inputs: what is left is our own error.
    want, want_dx = backward(lambda s: causal_softmax_reference(s, 0.3), x.double(), grad.double())
    for got, exact in ((probs, want), (dx, want_dx)):
        assert got.dtype == dtype
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=TOLERANCE[dtype] * max(1, exact.abs().max()))
    assert (probs.triu(1 + shape[3] - shape[2]) == 0).all()
    assert (dx.triu(1 + shape[3] - shape[2]) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponential_over_its_whole_range(dtype):
    """A second key far below the first: exp down to where float32 underflows to 0."""
    gap = torch.linspace(0, 110, 4001)
    scores = torch.stack([torch.zeros_like(gap), -gap], -1).to(dtype)[:, None, None, :]  # [b, 1, 1, 2]
    got = causal_softmax(scores, 1.0, "fused")[..., 1].double()
    want = causal_softmax_reference(scores.double(), 1.0)[..., 1]
    assert ((got - want).abs() <= 3e-7 * want + 2e-38).all() if dtype == torch.float32 else True
    assert ((got - want).abs() <= 5e-3 * want + 2e-38).all()
    assert (got[gap > 90] == 0).all()


def test_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: causal_softmax(s, 0.7, "fused"), (x,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["fused", "torch"])
def test_rows_without_a_finite_score_are_zero(kernel, device):
    x = torch.randn(1, 1, 4, 4, device=device)
    x[..., :2] = -torch.inf
    probs, dx = backward(lambda s: causal_softmax(s, 1.0, kernel), x, torch.ones_like(x))
    assert (probs[0, 0, :2] == 0).all()
    assert probs[0, 0, 2:].sum().item() == pytest.approx(2)
    assert not dx.isnan().any()


@pytest.mark.parametrize("kernel", ["fused", "torch"])
@pytest.mark.parametrize("at", [(0, 0), (3, 1)])
def test_nan_is_not_hidden(kernel, at):
    x = torch.randn(1, 1, 5, 5)
    x[0, 0][at] = torch.nan
    nan_rows = causal_softmax(x, 1.0, kernel).isnan().any(-1)[0, 0]
    assert nan_rows.tolist() == [row == at[0] for row in range(5)]


@pytest.mark.parametrize("view", ["heads last", "keys strided", "sliced", "expanded"])
def test_strided_scores_and_gradients(view):
    torch.manual_seed(0)
    x = {
        "heads last": torch.randn(2, 9, 3, 9).transpose(1, 2),
        "keys strided": torch.randn(2, 3, 9, 9).transpose(2, 3),
        "sliced": torch.randn(2, 3, 12, 20)[:, :, 3:, 11:],
        "expanded": torch.randn(1, 3, 9, 9).expand(2, 3, 9, 9),
    }[view]
    probs, dx = backward(lambda s: causal_softmax(s, 0.5, "fused"), x, x)
    want, want_dx = backward(lambda s: causal_softmax_reference(s, 0.5), x.contiguous(), x.contiguous())
    torch.testing.assert_close(probs, want)
    torch.testing.assert_close(dx, want_dx)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_thread_count_changes_nothing(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 150, 150).to(dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(backward(lambda s: causal_softmax(s, 0.3, "fused"), x, x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results))


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (1, 0, 3, 3), (1, 2, 0, 3)])
def test_empty_scores(shape):
    assert causal_softmax(torch.empty(shape), 1.0, "fused").shape == shape


@pytest.mark.parametrize("shape", [(2, 3, 3), (1, 1, 4, 3)])
def test_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match="s_k >= s_q"):
        causal_softmax(torch.zeros(shape), 1.0)


def test_schema_and_fake_kernel():
    """The fake kernel has the real one's shape, dtype and strides."""
    x = torch.randn(2, 3, 4, 5)
    torch.library.opcheck(torch.ops.megalite.causal_softmax.default, (x, 0.5), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.megalite.causal_softmax_backward.default, (x, x, 0.5), test_utils=CHECKS)
