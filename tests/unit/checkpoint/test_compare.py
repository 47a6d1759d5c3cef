"""Differences of two checkpoints are measured, and are differences of bits."""

from pathlib import Path

import pytest
import torch
from checkpoints import flip, tensors, tool, write

from megalite.checkpoint import compare as compare_module
from megalite.checkpoint.compare import compare, differing_values
from megalite.checkpoint.folder import read_manifest

pytestmark = pytest.mark.usefixtures("any_tensors")


def test_diff_measures(tmp_path: Path) -> None:
    values = tensors()
    values["weight.a"][3, 2] += 0.5
    values["exp_avg.c"] = values.pop("exp_avg.b")
    a, b = write(tmp_path / "a", 3), write(tmp_path / "b", 4, values)
    largest = values["weight.a"].abs().max()
    lines = tool("diff", a, b, status=1).splitlines()
    assert "state    step: 3 in a, 4 in b" in lines
    moved = abs(float(values["weight.a"][3, 2]) - float(tensors()["weight.a"][3, 2]))
    assert f"tensor   weight.a: max|a-b| {moved:.3e}, relative {moved / largest:.3e}, 1 of 64 elements" in lines
    assert lines[-3:] == ["tensor   exp_avg.b: only in a", "tensor   exp_avg.c: only in b", "3 of 5 tensors differ"]
    flip(next(b.glob("*.safetensors")), -1 - 256)
    assert (
        "do not match their checksum" in tool("diff", a, b, status=2).splitlines()[-1]
    )  # of what cannot be read nothing is said


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1.0, torch.nan, torch.inf], [1.0, torch.nan, torch.inf], None),
        ([1.0, torch.nan, 2.0], [1.0, torch.nan, 4.0], (1, 2.0, 0.5)),
        ([0.0, torch.inf], [-0.0, torch.inf], (1, 0.0, 0.0)),  # one bit
        ([1.0, 2.0], [0.0, 0.0], (2, 2.0, torch.inf)),
        ([1.0] * 5, [1.0] * 4 + [3.0], (1, 2.0, 2 / 3)),  # in the last chunk
    ],
)
def test_differences_are_of_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x: list[float], y: list[float], said: tuple[float, ...] | None
) -> None:
    monkeypatch.setattr(compare_module, "CHUNK", 2)
    a, b = (write(tmp_path / n, 1, {"weight.x": torch.tensor(v)}) for n, v in (("a", x), ("b", y)))
    ((_, found),) = compare((a, read_manifest(a)), (b, read_manifest(b)))
    assert (found and (found.elements, found.largest, found.relative)) == (said and pytest.approx(said))


def test_a_number_beside_a_nan_is_a_difference_of_nan(tmp_path: Path) -> None:
    a, b = (write(tmp_path / str(v), 1, {"weight.x": torch.tensor([v, 1.0])}) for v in (torch.nan, 1.0))
    ((_, found),) = compare((a, read_manifest(a)), (b, read_manifest(b)))
    assert found
    assert "max|a-b| nan, relative nan, 1 of 2 elements" in str(found)


def test_other_shapes_and_dtypes_are_told(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 1, {"weight.x": torch.ones(4), "weight.y": torch.tensor([1.0, 1 / 3])})
    b = write(tmp_path / "b", 1, {"weight.x": torch.ones(5), "weight.y": torch.tensor([1.0, 1 / 3]).bfloat16()})
    x, y = (str(d) for _, d in compare((a, read_manifest(a)), (b, read_manifest(b))))
    assert x == "weight.x: shape [4] in a, [5] in b"
    assert y.startswith("weight.y: float32 in a, bfloat16 in b; max|a-b| 6.510e-04, relative 6.510e-04, 1 of 2 elem")


def test_differing_values() -> None:
    a = {"same": 1, "model": {"x": 1, "y": [1], "nan": float("nan")}, "gone": 0}
    b = {"same": 1, "model": {"x": 2, "y": [1], "nan": float("nan")}, "new": {"z": 1}}
    assert list(differing_values(a, b)) == [("model.x", 1, 2), ("gone", 0, None), ("new", None, {"z": 1})]
