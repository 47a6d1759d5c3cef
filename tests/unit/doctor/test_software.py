"""Packages, compiled kernels and apex: each gap is found and has a remedy."""

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megalite.doctor import software
from megalite.doctor.__main__ import guarded


def test_requirements_of_a_checkout_and_of_an_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkout = software.requirements()
    assert checkout[""]["torch"] == ">=2.9,<2.14"
    assert checkout["plot"] == {"matplotlib": ">=3.8,<4"}
    monkeypatch.setattr(software, "PROJECT", tmp_path / "pyproject.toml")
    installed = ["torch<2.14,>=2.9", "PyYAML<7,>=6", 'matplotlib<4,>=3.8; extra == "plot"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: installed)
    assert software.requirements() == {
        "": {"torch": "<2.14,>=2.9", "pyyaml": "<7,>=6"},
        "plot": {"matplotlib": "<4,>=3.8"},
    }


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.9.0", True),
        ("2.9", True),
        ("2.13.1+cu126", True),
        ("2.14.0", False),
        ("2.14.0a0+git1", False),
        ("2.8.9", False),
        ("10.0", False),
    ],
)
def test_ranges(version: str, fits: bool) -> None:
    assert software.in_range(version, ">=2.9,<2.14") is fits
    assert software.in_range(version, "<2.14, >=2.9") is fits


def test_a_package_of_another_version_or_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert software.package("numpy", ">=99", "").value.endswith("is not in >=99")
    (tmp_path / "sentencepiece.py").write_text("raise ImportError('libfoo.so.3: cannot open\\nmore')")
    monkeypatch.delitem(sys.modules, "sentencepiece", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    found = software.package("sentencepiece", ">=0.2,<0.3", "")
    assert "fails to import: ImportError: libfoo.so.3: cannot open" in found.value
    assert found.state == "missing"


def test_without_compiled_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megalite._index", None)
    found = {f.name: f for f in software.built()}
    assert found["megalite._C"].value == "built for cpu" or torch.cuda.is_available()
    assert found["megalite._index"].value == "not built; numpy used instead"
    assert "pip install --no-build-isolation --no-deps -e ." in found["megalite._index"].remedy
    assert "apt-get install g++" in found["megalite._index"].remedy


# apex


def make_package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def apex_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    names = ("apex", "apex.multi_tensor_apply", "amp_C")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


def test_apex_absent() -> None:
    (found,) = software.apex()
    assert (found.state, found.value) == ("ok", "absent; megalite does not need it")


def test_the_other_apex_is_named_and_never_imported(apex_folder: Path) -> None:
    make_package(apex_folder, {"apex/__init__.py": "raise SystemExit('imported')", "apex/views.py": ""})
    (found,) = guarded(software.apex)
    assert "an unrelated package of that name (a web toolkit from the package index)" in found.value
    assert str(apex_folder) in found.value
    assert found.remedy.startswith("pip uninstall apex")
    assert "apex" not in sys.modules


def test_nvidias_apex(apex_folder: Path) -> None:
    applier = {"apex/__init__.py": "", "apex/multi_tensor_apply/__init__.py": "multi_tensor_applier = None"}
    make_package(apex_folder, applier)
    (found,) = software.apex()
    assert "without its CUDA part amp_C" in found.value
    make_package(apex_folder, {"amp_C.py": "multi_tensor_l2norm = None"})
    (found,) = software.apex()
    assert "with amp_C and multi_tensor_apply" in found.value
    assert found.state == "ok"


def test_nvidias_apex_that_does_not_load(apex_folder: Path) -> None:
    make_package(apex_folder, {"apex/multi_tensor_apply/__init__.py": "", "amp_C.py": "raise ImportError('libc10.so')"})
    (found,) = guarded(software.apex)
    assert found.value == "could not be checked (ImportError: libc10.so)"
