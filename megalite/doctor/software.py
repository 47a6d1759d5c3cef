"""Installed software: packages, compiled kernels, apex."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import shutil
from pathlib import Path

import megalite
from megalite.doctor import Finding, Findings, one_line

PROJECT = Path(megalite.__file__).parents[1] / "pyproject.toml"
MODULES = {"pyyaml": "yaml", "nvidia-ml-py": "pynvml"}
# dependencies that training can run without, and what they are for
OPTIONAL = {"pybind11": "building megalite._index", "nvidia-ml-py": "planning for GPU memory"}
EXTRAS = {"plot": "loss.png", "hf": "Hugging Face tokenizers and models", "log": "log.tensorboard"}


def requirements() -> dict[str, dict[str, str]]:
    """{extra, or "" for the basic requirements: {package: version range}}, from the checkout, else as installed."""
    if PROJECT.is_file():
        import tomllib

        table = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
        groups = {"": table["dependencies"], **table["optional-dependencies"]}
        lines = [(extra, line) for extra, group in groups.items() for line in group]
    else:
        parts = [line.partition(";") for line in importlib.metadata.requires("megalite") or []]
        lines = [(extra[1] if (extra := re.search(r"extra == .(\w+)", m)) else "", line) for line, _, m in parts]
    found: dict[str, dict[str, str]] = {}
    for extra, line in lines:
        if match := re.match(r"\s*([\w.-]+)\s*(.*?)\s*$", line):
            found.setdefault(extra, {})[match[1].lower()] = match[2]
    return found


def in_range(version: str, wanted: str) -> bool:
    """Whether `version` is in a range like ">=2.9,<2.14"; only the leading numbers of "2.13.0+cpu" count."""

    def number(text: str) -> list[int]:
        found = [int(part) for part in re.split(r"[^\d.]", text)[0].split(".") if part]
        return found + [0] * (4 - len(found))

    bounds = re.findall(r"(>=|<)\s*([\d.]+)", wanted)
    return all((number(version) < number(bound)) == (sign == "<") for sign, bound in bounds)


def packages() -> Findings:
    yield Finding("megalite", megalite.__version__)
    wanted = requirements()
    for name, span in wanted[""].items():
        yield package(name, span, OPTIONAL.get(name, ""))
    for extra, use in EXTRAS.items():
        for name, span in wanted.get(extra, {}).items():
            yield package(name, span, use)


def package(name: str, span: str, use: str) -> Finding:
    """Check that a package with a version in the range `span` is installed.

    `use`: what an optional package is for; "" if it is required.
    """
    needed, command, required = f", needed for {use}" if use else "", f"pip install '{name}{span}'", not use
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, f"not installed{needed}", command, required)
    if not in_range(version, span):
        return Finding(name, f"{version} is not in {span}{needed}", command, required)
    if required:
        # an installed package may fail to import: built for another Python, or another numpy
        try:
            importlib.import_module(MODULES.get(name, name))
        except Exception as error:
            value = f"{version} fails to import: {one_line(error)}"
            return Finding(name, value, f"{command} --force-reinstall", required)
    return Finding(name, version)


def built() -> Findings:
    from megalite.ops.kernel import BUILD_COMMAND, available

    tools = "" if shutil.which("c++") else " (needs a C++ compiler: apt-get install g++)"
    for name, without in (("megalite._C", "torch's own kernels"), ("megalite._index", "numpy")):
        try:
            importlib.import_module(name)
        except ImportError as error:
            why = "not built" if isinstance(error, ModuleNotFoundError) else f"fails to load ({one_line(error)})"
            yield Finding(name, f"{why}; {without} used instead", f"in megalite's folder, {BUILD_COMMAND}{tools}")
            continue
        devices = [d for d in ("cpu", "cuda") if any("fused" in op[d] for op in available().values())]
        yield Finding(name, f"built for {' and '.join(devices)}" if name == "megalite._C" else "built")


def kernels() -> Findings:
    """Which kernel train.kernels=auto chooses, by op, device and dtype."""
    import torch

    from megalite.checkpoint.dtypes import to_torch
    from megalite.config.dtypes import DTYPES
    from megalite.ops.kernel import BUILD_COMMAND, available, use_fused

    dtypes = {name: to_torch(row) for name, row in DTYPES.items()}
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for op, choices in available().items():
        words = []
        for device in devices:
            fused = [n for n, d in dtypes.items() if use_fused(op, "auto", torch.empty(0, dtype=d, device=device))]
            rest = [n for n in dtypes if n not in fused]
            words += [f"{device} {' '.join(names)} {k}" for k, names in (("fused", fused), ("torch", rest)) if names]
        unbuilt = "cuda" in devices and "fused" not in choices["cuda"]
        remedy = f"with nvcc on PATH, in megalite's folder, {BUILD_COMMAND}"
        yield Finding(op, "; ".join(words), remedy if unbuilt else "")
    flash = " with flash kernels" if "cuda" in devices and torch.backends.cuda.is_flash_attention_available() else ""
    path = f"torch's scaled_dot_product_attention{flash}; causal_softmax only with train.kernels=fused or torch"
    yield Finding("attention", path)


def apex() -> Findings:
    """Look for NVIDIA apex by its parts, without importing the unrelated package of the same name."""
    name, spec = "NVIDIA apex", importlib.util.find_spec("apex")
    if spec is None:
        yield Finding(name, "absent; megalite does not need it")
        return
    places = list(spec.submodule_search_locations or [])
    if not any((Path(place) / "multi_tensor_apply").is_dir() for place in places):
        where = places[0] if places else spec.origin
        value = f"absent; {where} is an unrelated package of that name (a web toolkit from the package index)"
        yield Finding(name, value, "pip uninstall apex, unless other software needs it; megalite needs neither")
    elif importlib.util.find_spec("amp_C") is None:
        yield Finding(name, f"{places[0]}, without its CUDA part amp_C; megalite does not need it")
    else:
        importlib.import_module("torch")  # amp_C is linked to its libraries
        parts = {"amp_C": "multi_tensor_l2norm", "apex.multi_tensor_apply": "multi_tensor_applier"}
        lost = [f"{m}.{symbol}" for m, symbol in parts.items() if not hasattr(importlib.import_module(m), symbol)]
        value = f"without {', '.join(lost)}" if lost else "with amp_C and multi_tensor_apply"
        yield Finding(name, f"{places[0]}, {value}; megalite does not need it")
