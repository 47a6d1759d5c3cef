"""Who may import whom: a module imports its own floor or those below, by the table here.

A new module of megalite needs a floor. Of two that would do, take the lower: more may then import it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = {
    6: ("tools", "examples", "benchmarks", "entry", "doctor"),  # thin: parse, call, print
    5: ("trainer", "run", "restore", "run_folder", "generate", "evaluate", "divergence", "together"),
    4: ("build", "engine"),  # the only place where the tables meet
    3: ("pipeline", "model", "optim", "checkpoint", "tune", "hf", "request", "resume", "loaded", "agree"),
    2: ("parallel", "data", "watch", "plan", "topology", "activations", "batches"),
    1: ("config", "ops", "place", "launcher", "arguments", "disk"),
    0: ("megalite",),  # the version alone
}

# (who, whom, who may all the same); a name stands for all that is under it too
NEVER = [
    ("megalite.model", "megalite.parallel", ("megalite.model.cut_table", "megalite.model.init")),  # the plain model
    ("megalite.model", "megalite.pipeline", ()),
    ("megalite.pipeline", "megalite.model", ()),
    ("megalite", "megalite.run.trainer", ("megalite.run.entry",)),
    *(
        (f"megalite.{name}", "torch", ())
        for name in (
            "arguments",
            "config",
            "place",
            "launcher",
            "plan",
            "topology",
            "activations",
            "generate.text",
            "generate.source",
            "generate.chat",
            "evaluate.rows",
            "checkpoint.folder",
            "checkpoint.describe",
            "tune.adapter_config",
            "tune.base",
            "request",
            "resume",
            "loaded",
            "agree",
        )
    ),  # mistakes are told without torch
    *((f"megalite.hf.{name}", "torch", ()) for name in ("config", "fields", "folder", "keys", "megatron_args", "rope")),
    *((f"megalite.pipeline.{name}", "torch", ()) for name in ("schedule", "simulate", "lower")),
]

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("megalite", "tools", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def floor(module: str) -> int:
    unit = module.removeprefix("megalite.").split(".")[0]
    found = [number for number, units in FLOORS.items() if unit in units]
    assert found, f"{module}: give {unit!r} a floor in {Path(__file__).name}"
    return found[0]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it; of `from a import b` a.b where that is a module, else a."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the import out in full"
            yield from (
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in FILES else node.module for a in node.names
            )


GRAPH = {module: sorted(set(imports(path))) for module, path in FILES.items()}


def reach(module: str) -> dict[str, str]:
    """All that `module` imports, in the end, each with the one that imports it."""
    found: dict[str, str] = {}
    todo = [module]
    while todo:
        here = todo.pop()
        for name in GRAPH.get(here, ()):
            if name not in found:
                found[name] = here
                todo.append(name)
    return found


@pytest.mark.parametrize("module", FILES)
def test_floors(module: str) -> None:
    for name in GRAPH[module]:
        if name in FILES:
            assert floor(name) <= floor(module), f"{module} imports {name} of a higher floor"
    for who, whom, exempt in NEVER:
        if under(module, who) and not under(module, whom) and module not in exempt:
            # of torch also what comes by way of others
            names = reach(module) if whom == "torch" else dict.fromkeys(GRAPH[module], module)
            broken = [f"{by} imports {name}" for name, by in names.items() if under(name, whom)]
            assert not broken, f"{module} must not reach {whom}: {', '.join(broken)}"


@pytest.mark.parametrize("module", FILES)
def test_no_import_circle(module: str) -> None:
    found = reach(module)
    assert module not in found, f"{module} is imported, by way of others, by {found[module]}"


def test_the_page_on_design_has_these_floors() -> None:
    table = re.findall(
        r"^\| (\d) \| ([\w, ]+)", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {int(number): tuple(units.strip().split(", ")) for number, units in table} == {
        number: units for number, units in FLOORS.items() if number > 0
    }


def test_the_graph_is_not_empty() -> None:
    """A test of imports that finds none would pass for ever."""
    assert "torch" in reach("megalite.engine.engine")
    assert "megalite.config.schema" in reach("megalite.engine.engine")
    assert "megalite.parallel.cuts" in GRAPH["megalite.model.cut_table"]
    assert "megalite.ops" in GRAPH["megalite.model.decoder"]  # of `from megalite import ops`
    assert floor("megalite.engine.engine") == 4
    assert floor("tools.schedule") == 6
