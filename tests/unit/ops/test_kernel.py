"""The choice between the compiled kernel and the torch reference."""

import logging

import pytest
import torch

from megalite import ops
from megalite.ops import kernel


@pytest.fixture
def fresh_choice():
    kernel._use_fused.cache_clear()
    yield
    kernel._use_fused.cache_clear()


def test_report():
    report = ops.available()
    assert set(report) == {"causal_softmax", "rope"}
    assert all(devices["cpu"] == ["fused", "torch"] for devices in report.values())


def test_auto_is_logged_once(fresh_choice, caplog):
    caplog.set_level(logging.INFO, "megalite.ops")
    for _ in range(3):
        ops.causal_softmax(torch.zeros(1, 1, 2, 2), 1.0)
    assert [r.getMessage() for r in caplog.records] == ["causal_softmax on cpu, torch.float32: fused"]


def test_auto_falls_back_on_a_dtype_without_kernel(fresh_choice, caplog):
    caplog.set_level(logging.INFO, "megalite.ops")
    x = torch.randn(1, 1, 3, 3, dtype=torch.float16)
    assert torch.equal(ops.causal_softmax(x, 0.5), ops.causal_softmax_reference(x, 0.5))
    assert "not float16" in caplog.text
    with pytest.raises(ValueError, match="supports float32, bfloat16, float64, not float16"):
        ops.causal_softmax(x, 0.5, kernel="fused")


def test_without_the_extension(fresh_choice, monkeypatch):
    monkeypatch.setattr(kernel, "_load_error", "megalite._C is not built")
    assert ops.available()["rope"]["cpu"] == ["torch"]
    x = torch.randn(1, 1, 3, 3)
    assert torch.equal(ops.causal_softmax(x, 0.5), ops.causal_softmax_reference(x, 0.5))
    with pytest.raises(ValueError, match=r"megalite\._C is not built; build it with `pip install"):
        ops.causal_softmax(x, 0.5, kernel="fused")


def test_unknown_kernel():
    with pytest.raises(ValueError, match='"auto", "fused" or "torch"'):
        ops.causal_softmax(torch.zeros(1, 1, 2, 2), 1.0, kernel="flash")
