"""A thousand damaged or forged checkpoints: each is refused in a line that names file or tensor, or loads right.

A manifest whose digest the forger has corrected can claim another step, configuration, version or data fingerprint:
digests are no signatures, and nothing tells these from true ones (all that is not in TENSORS) as long as they are of
values that a run can have. Its tensors are checked all the same: which there must be by the configuration, shapes,
ranges, dtypes, names and checksums against the files. No mutation may run code, take memory that the files do not
account for, wait, or end in any other exception. What `verify` calls good can be loaded and resumed from.
"""

import json
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from manifest_mutations import COUNTERS, MUTATIONS, NEVER_BELIEVED
from mutations import CONFIG, KINDS, SEED, SHAPES, STATE, STEP, TRUE, Random, rename_folder, shards
from torch import Tensor

from megalite.checkpoint import blocks as blocks_module
from megalite.checkpoint.describe import describe, describe_lines, state_of
from megalite.checkpoint.faults import Faults
from megalite.checkpoint.folder import BUILDING, check_model, find, read_manifest
from megalite.checkpoint.load import load, read_tensor
from megalite.checkpoint.manifest import Damaged, digest
from megalite.checkpoint.publish import publish, write_rank
from megalite.checkpoint.save import own_parts
from megalite.checkpoint.verify import verify

COUNT = 1200
# what the manifest says of tensors, and of itself
TENSORS = {"format", "digest", "files", "tensors"}


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of two ranks, in blocks of a few rows and two files a rank."""
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 128)
    monkeypatch.setattr(blocks_module, "FILE_BYTES", 1500)
    final = tmp_path / "good" / "checkpoints" / STEP
    for rank in range(2):
        here = shards(rank, 2)
        kinds = {kind: {n: here[n].cut(TRUE[f"{kind}.{n}"]) for n in SHAPES} for kind in KINDS}
        spans = {n: range(here[n].numel) for n in SHAPES}
        owned = list(own_parts(here, spans, kinds))
        building = final.with_name(BUILDING + final.name)
        write_rank(building, rank, [p for p, _ in owned], (v for _, v in owned), Faults(rank, ""))
    publish(building, final, CONFIG, STATE, Faults(0, ""))
    assert len(list(final.glob("rank-00001-*.safetensors"))) > 1
    return final


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The process may take half a GiB more than it has; what asks for more fails with no ValueError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read_all(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state, tensors) as they are loaded whole and, bit for bit the same, as the second of two ranks loads them."""
    manifest = read_manifest(find(folder))
    check_model(manifest, CONFIG.model.__dict__, folder)
    tensors = {name: read_tensor(folder, manifest, name) for name in TRUE}
    here = shards(1, 2)
    local = {kind: {n: torch.zeros(here[n].local_shape) for n in SHAPES} for kind in KINDS}
    load(folder, manifest, here, local)
    assert all(local[k][n].equal(here[n].cut(tensors[f"{k}.{n}"])) for k in KINDS for n in SHAPES)
    return state_of(manifest), tensors


def judge(folder: Path) -> tuple[str, dict[str, Any]]:
    """("refused", {}) or ("loaded", its state); fails on anything between."""
    try:
        state, tensors = read_all(folder)
    except ValueError as error:
        text = str(error)
        assert "\n" not in text
        assert text.isprintable()
        assert len(text) < 1000
        assert str(folder) in text or any(name in text for name in TRUE), text
        return "refused", {}
    for name, x in tensors.items():
        assert x.dtype == TRUE[name].dtype
        assert x.equal(TRUE[name]), name
    return "loaded", state


def also_by_the_tool(folder: Path) -> bool:
    """What `verify` and `info` of tools/checkpoint.py call: whether they find the checkpoint whole."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return False
    describe_lines(describe(folder, manifest))
    return not verify(folder, manifest, threads=1).damages


def test_a_thousand_mutations(good: Path, tmp_path: Path, little_memory: None) -> None:
    assert judge(good) == ("loaded", STATE)
    assert also_by_the_tool(good)
    outcomes: Counter[tuple[str, str]] = Counter()
    for number in range(COUNT):
        rng = Random(f"{SEED} {number}")
        mutation = MUTATIONS[number % len(MUTATIONS)]
        run = tmp_path / f"mutated-{number}"
        shutil.copytree(good.parents[1], run)
        folder = run / "checkpoints" / STEP
        said = f"seed {SEED}, number {number}: {mutation.__name__} {mutation(rng, folder)}"
        if mutation is rename_folder:
            (folder,) = (run / "checkpoints").iterdir()
        try:
            outcome, state = judge(folder)
            forged = mutation.__name__.endswith("_signed")
            if outcome == "loaded" and not forged:
                assert state == STATE
            if outcome == "loaded" and forged:
                claimed = [key for key in {*STATE, *state} if state.get(key, key) != STATE.get(key, key)]
                assert len(claimed) <= 2  # a renamed key is one that went and one that came
                assert not TENSORS & set(claimed)
            whole = also_by_the_tool(folder)
            # a forged configuration may be of another model with the same tensors
            assert whole == (outcome == "loaded") or (whole and forged and "config" in said)
        except Exception as error:
            raise AssertionError(said) from error
        assert not (tmp_path / "marker").exists(), said
        outcomes[mutation.__name__, outcome] += 1
        shutil.rmtree(run)
        for name in ("outside", "moved"):
            path = tmp_path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    never_harmless = {"flip_a_bit", "cut", "grow", "empty", "remove_file", "swap_files", "link_file", "rename_folder"}
    never_harmless |= {f"{change.__name__}{signed}" for change in NEVER_BELIEVED for signed in ("", "_signed")}
    assert not [name for name, outcome in outcomes if name in never_harmless and outcome == "loaded"]
    assert {name for name, outcome in outcomes if outcome == "loaded"} >= {"add_file", "link_folder", "duplicate_keys"}
    print("\n".join(f"{name:<28}{outcome:<9}{count}" for (name, outcome), count in sorted(outcomes.items())))


OTHERS = {"step": 7, "consumed_samples": 7, "best_loss": 7, "data": "7", "base": "0123456789abcdef /runs/b"}


@pytest.mark.parametrize("key", sorted(STATE))
def test_a_forger_can_change_only_what_is_no_tensor(good: Path, key: str) -> None:
    """With the digest corrected another counter is believed (the step too, with its folder's name)."""
    path = good / "manifest.json"
    manifest = json.loads(path.read_text())
    assert key not in TENSORS
    manifest[key] = OTHERS.get(key, 2)
    manifest["digest"] = digest(manifest)
    path.write_text(json.dumps(manifest))
    folder = good.rename(good.with_name("step-00000007")) if key == "step" else good
    assert judge(folder) == ("loaded", {**STATE, key: manifest[key]})


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in COUNTERS.items() for value in values])
def test_no_counter_is_believed_that_a_run_cannot_have(good: Path, key: str, value: Any) -> None:
    path = good / "manifest.json"
    manifest = json.loads(path.read_text()) | {key: value}
    manifest["digest"] = digest(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=rf"manifest\.json: not a manifest \(.*{key}") as error:
        read_manifest(good)
    assert len(str(error.value)) < 600


def test_a_checkpoint_of_weights_alone_is_whole(good: Path) -> None:
    """As one that was converted; of one kind of the optimizer's tensors alone it is not."""
    path = good / "manifest.json"
    manifest = json.loads(path.read_text())
    for kinds in (("weight", "exp_avg"), ("weight",)):
        tensors = {name: t for name, t in manifest["tensors"].items() if name.split(".")[0] in kinds}
        changed = manifest | {"tensors": tensors}
        path.write_text(json.dumps(changed | {"digest": digest(changed)}))
        if kinds == ("weight",):
            assert verify(good, read_manifest(good), threads=1).damages == []
        else:
            with pytest.raises(Damaged, match=r"14 of the 42 tensors that its configuration needs are missing, among"):
                read_manifest(good)
