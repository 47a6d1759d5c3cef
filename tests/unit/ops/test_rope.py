import pytest
import torch

from megalite.ops import apply_rope, apply_rope_reference, rope_cos_sin

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}
# (b, s, heads…, head_dim), rot_dim: odd halves, partial rotation, kv groups of queries.
CHECKS = ("test_schema", "test_faketensor")
SHAPES = [
    ((1, 1, 1, 2), 2),
    ((2, 5, 3, 16), 16),
    ((2, 7, 4, 20), 12),
    ((1, 33, 2, 4, 38), 38),
    ((2, 3, 2, 2, 128), 128),
]


def backward(fn, x, grad):
    x = x.detach().requires_grad_()
    out = fn(x)
    out.backward(grad)
    return out.detach(), x.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "rot_dim"), SHAPES)
def test_matches_reference(shape, rot_dim, dtype, per_sequence, device):
    torch.manual_seed(0)
    x, grad = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype)
    positions = torch.randint(1000, shape[:2] if per_sequence else shape[1:2], device=device)
    cos, sin = rope_cos_sin(positions, rot_dim, 10000.0)
    inputs = x, grad, cos, sin
    before = [t.clone() for t in inputs]
    got = backward(lambda t: apply_rope(t, cos, sin, "fused"), x, grad)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before))
    wide = cos.double(), sin.double()
    want = backward(lambda t: apply_rope_reference(t, *wide), x.double(), grad.double())
    for ours, exact in zip(got, want):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        torch.testing.assert_close(ours.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(got[0][..., rot_dim:], x[..., rot_dim:])


@pytest.mark.parametrize("kernel", ["fused", "torch"])
def test_gradcheck(kernel):
    torch.manual_seed(0)
    cos, sin = rope_cos_sin(torch.arange(3), 4, 100.0, torch.float64)
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: apply_rope(t, cos, sin, kernel), (x,))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_views_of_a_fused_qkv(dtype):
    """Queries lie in kv groups between keys and values: 5 dims, read where they are."""
    torch.manual_seed(0)
    groups, per_group, head_dim = 2, 3, 8
    qkv = torch.randn(2, 5, groups, per_group + 2, head_dim).to(dtype)
    cos, sin = rope_cos_sin(torch.arange(5), head_dim)
    for view in (qkv[..., :per_group, :], qkv[..., per_group, :]):
        assert not view.is_contiguous()
        assert torch.equal(apply_rope(view, cos, sin, "fused"), apply_rope(view.contiguous(), cos, sin, "fused"))
    strided = qkv.transpose(-1, -2)[..., :2, :4]
    assert torch.equal(
        apply_rope(strided, *rope_cos_sin(torch.arange(5), 4), "fused"),
        apply_rope(strided.contiguous(), *rope_cos_sin(torch.arange(5), 4), "fused"),
    )


def test_thread_count_changes_nothing():
    torch.manual_seed(0)
    x = torch.randn(2, 200, 8, 64)
    cos, sin = rope_cos_sin(torch.arange(200), 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(apply_rope(x, cos, sin, "fused"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [6, 10, 16, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_tables_equal_transformers(head_dim, theta, dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta}, max_position_embeddings=5000
    )
    for positions in (torch.arange(4099)[None], torch.randint(5000, (3, 7))):
        want = llama.LlamaRotaryEmbedding(config)(torch.empty(0, dtype=dtype), positions)
        for ours, theirs in zip(rope_cos_sin(positions, head_dim, theta, dtype), want):
            assert ours.dtype == dtype
            assert torch.equal(torch.cat([ours, ours], -1), theirs)


def test_rotation_equals_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    q = torch.randn(2, 9, 4, 16, dtype=torch.float64)
    cos, sin = rope_cos_sin(torch.arange(9), 16, 10000.0, torch.float64)
    want, _ = llama.apply_rotary_pos_emb(
        q, q, torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None], unsqueeze_dim=2
    )
    torch.testing.assert_close(apply_rope(q, cos, sin), want, rtol=0, atol=1e-15)


def test_wrong_shapes_are_named():
    cos, sin = rope_cos_sin(torch.arange(4), 8)
    with pytest.raises(ValueError, match="got \\[2, 3, 16\\]"):
        apply_rope(torch.zeros(2, 3, 16), cos, sin)
    with pytest.raises(ValueError, match="got \\[4, 4\\] and \\[4, 4\\]"):
        apply_rope(torch.zeros(2, 5, 1, 16), cos, sin)
    with pytest.raises(ValueError, match="exceeds head_dim=6"):
        apply_rope(torch.zeros(2, 4, 1, 6), cos, sin)
    with pytest.raises(ValueError, match="rot_dim=7"):
        rope_cos_sin(torch.arange(4), 7)


def test_schema_and_fake_kernel():
    """The fake kernel has the real one's shape, dtype and strides."""
    cos, sin = rope_cos_sin(torch.arange(4), 8)
    torch.library.opcheck(
        torch.ops.megalite.rope.default, (torch.randn(2, 4, 3, 8), cos, sin, False), test_utils=CHECKS
    )
