"""Tests mirror the source tree: a module's tests are found by its name. Files and functions stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FILE, LONGEST_FUNCTION = 300, 60
# a reason in a file's first lines, in the words of one of these
REASONS = {"file": "Longer than 300 lines:", "function": "Functions longer than 60 lines:"}
REASON_LINES = 10

# modules without a test file of their own
UNTESTED = {
    "megalite/config/errors.py": "two classes of exceptions, without code",
}
# files of tests/unit/FOLDER that are not named after a module
OTHER = {
    "checkpoint/test_tool.py": "tests tools/checkpoint.py on the checkpoints of its neighbours",
    "ops/test_nvcc.py": "compiles the CUDA sources of csrc/",
}

MODULES = sorted(path for path in (ROOT / "megalite").rglob("*.py") if path.name != "__init__.py")
TESTS = sorted((ROOT / "tests" / "unit").rglob("test_*.py"))
SOURCES = [
    path
    for folder in ("megalite", "tools", "examples", "benchmarks", "docs", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def subject(path: Path) -> str:
    """What the names of a module's tests begin with; of `__main__` it is main."""
    return path.stem.strip("_")


def is_of(test: Path, module: Path) -> bool:
    """Whether a test file's name is that of a module, alone or with a topic."""
    begin = f"test_{subject(module)}"
    return test.stem == begin or test.stem.startswith(f"{begin}_")


def neighbours(folder: Path) -> list[Path]:
    """The modules that the tests of a folder are named after."""
    here = folder.relative_to(ROOT / "tests" / "unit")
    return sorted((ROOT / "tools" if here.parts == ("tools",) else ROOT / "megalite" / here).glob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_every_module_has_a_test_file(module: Path) -> None:
    folder = ROOT / "tests" / "unit" / module.parent.relative_to(ROOT / "megalite")
    found = [test for test in folder.glob("test_*.py") if is_of(test, module)]
    found += [ROOT / "tests" / "dist" / f"test_{subject(module)}.py"]
    exists = any(test.is_file() for test in found)
    if name_of(module) in UNTESTED:
        assert not exists, f"{name_of(module)} has a test file now; remove it from UNTESTED"
    else:
        assert exists, f"{name_of(module)} has no test file; write {name_of(folder)}/test_{subject(module)}.py"


@pytest.mark.parametrize("test", [test for test in TESTS if test.parent.name != "unit"], ids=name_of)
def test_every_test_file_is_named_after_a_module(test: Path) -> None:
    named = any(is_of(test, module) for module in neighbours(test.parent))
    if name_of(test).removeprefix("tests/unit/") in OTHER:
        assert not named
    else:
        assert named, f"{name_of(test)} begins with no module's name; rename it, or add it to OTHER with the reason"


def has_reason(path: Path, kind: str) -> bool:
    return REASONS[kind] in "\n".join(path.read_text(encoding="utf-8").splitlines()[:REASON_LINES])


def long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE or has_reason(path, "file"), (
        f"{name_of(path)} has {lines} lines, more than {LONGEST_FILE}; split it, or state in its first lines why not: "
        f"{REASONS['file']} ..."
    )
    long = list(long_functions(path))
    assert not long or has_reason(path, "function"), (
        f"{name_of(path)}: {', '.join(long)}, more than {LONGEST_FUNCTION}; split it, or state in the file's first "
        f"lines why not: {REASONS['function']} ..."
    )


def test_exceptions_exist() -> None:
    assert all((ROOT / name).is_file() for name in UNTESTED)
    assert all((ROOT / "tests" / "unit" / name).is_file() for name in OTHER)


def test_a_broken_rule_is_seen(tmp_path: Path) -> None:
    """A test of names that finds none would pass for ever."""
    assert is_of(Path("test_engine_parity.py"), Path("engine.py"))
    assert is_of(Path("test_main.py"), Path("__main__.py"))
    assert not is_of(Path("test_engines.py"), Path("engine.py"))
    assert ROOT / "megalite" / "model" / "decoder.py" in MODULES
    assert ROOT / "tests" / "dist" / "ranks.py" in SOURCES
    assert ROOT / "tools" / "schedule.py" in neighbours(ROOT / "tests" / "unit" / "tools")
    path = tmp_path / "long.py"
    path.write_text("def f():\n" + "    pass\n" * LONGEST_FUNCTION)
    assert list(long_functions(path)) == ["f has 61 lines"]
    assert not has_reason(path, "file")
    path.write_text(f'"""Something.\n\n{REASONS["file"]} one table.\n"""\n')
    assert has_reason(path, "file")
    assert not has_reason(path, "function")
