"""Who may import whom: a module imports its own folder, or folders of lower floors, by the table here.

A new folder of megalite needs a floor. Of two that would do, take the lower: more may then import it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = {
    6: ("tools", "examples", "benchmarks"),  # thin: parse, call, print
    5: ("run", "inference"),
    4: ("engine",),  # the only place where the tables meet
    3: ("exchange", "optim", "doctor"),
    2: ("model", "checkpoint", "data", "plan"),
    1: ("config", "parallel", "pipeline", "ops", "text", "launch", "watch"),
    0: ("megalite",),  # the version alone
}

# (who, whom, who may all the same); a name stands for all that is under it too
LAYOUT = tuple(f"megalite.model.{name}" for name in ("cut_table", "init", "lora"))
NEVER = [
    ("megalite.model", "megalite.parallel", LAYOUT),  # the plain model
    ("megalite.model", "megalite.pipeline", ()),
    ("megalite", "megalite.run.trainer", ("megalite.run.entry",)),
    # mistakes are reported without torch
    *(
        (f"megalite.{name}", "torch", ())
        for name in (
            "config",
            "launch.arguments",
            "launch.launcher",
            "launch.peers",
            "launch.place",
            "launch.stop",
            "plan",
            "text",
            "pipeline.schedule",
            "pipeline.simulate",
            "pipeline.lower",
            "data.demo",
            "data.origin",
            "pipeline.forecast",
            "checkpoint.folder",
            "checkpoint.describe",
            "exchange.adapter_config",
            "exchange.base",
            "exchange.hf_config",
            "exchange.hf_fields",
            "exchange.hf_folder",
            "exchange.hf_keys",
            "exchange.hf_rope",
            "exchange.megatron_args",
            "inference.chat",
            "inference.eval_rows",
            "inference.reply",
            "inference.source",
            "run.agree",
            "run.command",
            "run.inherit",
            "run.length",
            "run.objective",
            "run.resume",
            "run.run_folder",
        )
    ),
]

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("megalite", "tools", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room(module: str) -> str:
    return module.removeprefix("megalite.").split(".")[0]


def floor(module: str) -> int:
    found = [number for number, rooms in FLOORS.items() if room(module) in rooms]
    assert found, f"{module}: give {room(module)!r} a floor in {Path(__file__).name}"
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


ROOMS = sorted({room(module) for module in FILES} - {"megalite"})
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
        if name in FILES and room(name) != room(module):
            assert floor(name) < floor(module), f"{module} imports {name}, which is not on a lower floor"
    for who, whom, exempt in NEVER:
        if under(module, who) and not under(module, whom) and module not in exempt:
            # of torch also what comes by way of others
            names = reach(module) if whom == "torch" else dict.fromkeys(GRAPH[module], module)
            broken = [f"{by} imports {name}" for name, by in names.items() if under(name, whom)]
            assert not broken, f"{module} must not reach {whom}: {', '.join(broken)}"


def test_the_house(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the house: `make check` shows it."""
    arrows = {(room(who), room(whom)) for who in FILES for whom in GRAPH[who] if whom in FILES} - {
        (r, r) for r in ROOMS
    }
    circles = [(a, b) for a, b in arrows if (b, a) in arrows]
    up = [(a, b) for a, b in arrows if floor(b) > floor(a)]
    within = [(a, b) for a, b in arrows if floor(b) == floor(a)]
    with capsys.disabled():
        print(
            f"\n{len(FLOORS) - 1} floors, {len(ROOMS)} rooms, {len(FILES)} modules; "
            f"{len(arrows)} arrows between rooms: {len(up)} up, {len(within)} within a floor, {len(circles)} circles"
        )
    assert not up
    assert not within
    assert not circles
    assert set(ROOMS) == {name for names in FLOORS.values() for name in names} - {"megalite"}


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
    assert "megalite.config.schema" in reach("megalite.engine.stage")
    assert "megalite.parallel.cuts" in GRAPH["megalite.model.cut_table"]
    assert "megalite.ops" in GRAPH["megalite.model.decoder"]  # of `from megalite import ops`
    assert floor("megalite.engine.engine") == 4
    assert floor("tools.schedule") == 6
