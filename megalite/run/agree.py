"""Checks, before the first collective, that all ranks have the same files, keys, checkpoint and run folder.

Nodes with local disks may have different files under the same name. Each rank reports what it has, rank 0 compares, and
the rank that differs prints the difference. No torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import find, read_manifest
from megalite.config import Config
from megalite.launch.peers import Peers
from megalite.launch.place import Place
from megalite.run.run_folder import PROBE

# files up to this size are read whole, larger ones in 64 samples
WHOLE_BYTES = 1 << 26
PART_BYTES, PARTS = 1 << 16, 64
SHARED = "train.run_dir must be on a file system that all nodes share"

Report = dict[str, Any]


def report(config: Config, resume: Path | None, here: Place) -> Report:
    """This rank's report, with facts {what: state}; on several nodes the first rank of each also reads the files."""
    # the first difference is reported, so causes come before what follows from them
    found = "no checkpoint" if resume is None else _name(resume)
    facts = {f"train.run_dir={config.train.run_dir}": f"has {found}"}
    if here.local_rank == 0 and here.local_ranks < here.world_size:
        facts |= {what: f"holds {fingerprint(files)}" for what, files in _files(config)}
        if config.checkpoint.load is not None:
            facts[f"checkpoint.load={config.checkpoint.load}"] = f"holds {_name(find(config.checkpoint.load))}"
    for section, values in dataclasses.asdict(config).items():
        facts |= {f"{section}.{key}": f"is {value}" for key, value in values.items()}
    return start_report(here) | {"facts": facts}


def paths_report(named: Mapping[str, str], here: Place) -> Report:
    """A tool's report on its arguments {what: path}, each a run folder, a checkpoint or other files."""
    facts: dict[str, str] = {}
    if here.local_rank == 0 and here.local_ranks < here.world_size:
        for what, name in named.items():
            path = Path(name)
            saved = (path / "checkpoints").is_dir() or (path / "manifest.json").is_file()
            if saved or (files := _of("", path)):
                facts[f"{what}={name}"] = f"holds {_name(find(path)) if saved else fingerprint(files)}"
    return start_report(here) | {"facts": facts}


def start_report(here: Place, error: str = "", printed: bool = False) -> Report:
    """A report without facts. `printed`: whether this rank has printed the error already."""
    return {"host": socket.gethostname(), "node": here.node, "error": error, "printed": printed, "facts": {}}


def fingerprint(files: Sequence[Path]) -> str:
    """Size and digest of several files as one short text."""
    digest, size = hashlib.blake2b(digest_size=6), 0
    for path in files:
        with open(path, "rb") as file:
            length = file.seek(0, 2)
            size += length
            digest.update(f"{path.name} {length}\n".encode())
            if length <= WHOLE_BYTES:
                file.seek(0)
                while block := file.read(1 << 22):
                    digest.update(block)
                continue
            for part in range(PARTS):
                file.seek((length - PART_BYTES) * part // (PARTS - 1))
                digest.update(file.read(PART_BYTES))
    return f"{size:,} bytes, digest {digest.hexdigest()}"


def _files(config: Config) -> Iterator[tuple[str, list[Path]]]:
    d = config.data
    named = {"data.path": d.path, "data.sft": d.sft, "data.tokenizer": d.tokenizer, "data.template": d.template}
    named |= {f"data.valid.{name}": path for name, path in d.valid.items()} | {"model.from_hf": config.model.from_hf}
    for key, value in named.items():
        if value is not None and (files := _of(key, Path(value))):
            yield f"{key}={value}", files


def _of(key: str, path: Path) -> list[Path]:
    """The files behind a key's value: one file, those of a prefix, or those in a folder."""
    if path.is_dir():
        kinds = (".json", ".jinja", ".model", ".safetensors")
        return sorted(file for file in path.iterdir() if file.suffix in kinds and file.is_file())
    if path.is_file():
        beside = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        near = [path.with_name(name) for name in beside] if key == "data.tokenizer" else []
        return [path, *(file for file in near if file.is_file() and file != path)]
    parts = [Path(f"{path}{end}") for end in (".bin", ".idx", "_weights.bin", "_weights.idx")]
    return [file for file in parts if file.is_file()]


def _name(checkpoint: Path) -> str:
    return f"{checkpoint.name} ({str(read_manifest(checkpoint).get('digest', ''))[:12]})"


def difference(reports: Sequence[Report]) -> tuple[int, str] | None:
    """(rank, text) for the first rank with an error, else the first that differs from rank 0; None if all agree."""
    for rank, each in enumerate(reports):
        if each["error"]:
            return rank, "" if each["printed"] else each["error"]
    first = reports[0]
    for what, there in first["facts"].items():
        for rank, each in enumerate(reports):
            if (here := each["facts"].get(what, there)) != there:
                return rank, f"{what} {here} here and {there} on rank 0 ({first['host']}); {_remedy(what)}"
    return None


def _remedy(what: str) -> str:
    if what.startswith("train.run_dir="):
        return SHARED
    if "=" in what:
        return "give every node the same files, preferably on a shared file system"
    if what in ("parallel.tp", "parallel.pp", "parallel.dp"):
        return "nodes with different memory chose different topologies; set parallel.tp and parallel.pp"
    if what in ("torch", "train.device=auto"):
        return "use the same Python environment and kind of GPU on all nodes, or set train.device"
    return "start all ranks with the same command and the same configuration files"


def settle(peers: Peers, mine: Report, run_dir: Path | None = None) -> None:
    """Compare all ranks' reports and check that all see the same `run_dir`; end the run if they differ."""
    _judge(peers, peers.gather(mine))
    if run_dir is None:
        return
    mark, problem = f"{PROBE}-{secrets.token_hex(8)}", ""
    if peers.hub is not None:
        try:
            (run_dir / mark).touch()
        except OSError as error:
            peers.accuse(0, f"{run_dir}: {error.strerror}", [mine])
    mark = peers.share(mark)
    if peers.hub is None:
        problem = _problem(run_dir, mark, peers.here)
    reports = peers.gather(start_report(peers.here, problem))
    if peers.hub is not None:
        (run_dir / mark).unlink(missing_ok=True)
    _judge(peers, reports)


def _judge(peers: Peers, reports: Sequence[Report]) -> None:
    if found := difference(reports) if reports else None:
        peers.accuse(*found, reports)
    peers.share("equal")


def _problem(run_dir: Path, mark: str, here: Place) -> str:
    """What is wrong with `run_dir` on this rank, "" if nothing; rank 0 has created the file `mark` in it."""
    made = not run_dir.is_dir()
    try:
        # makes a network file system look again for a folder it has cached as missing
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / mark).is_file():
            if here.local_rank == 0:
                mine = run_dir / f"{mark}-{here.rank}"
                mine.touch()
                mine.unlink()
            return ""
        if made:
            with contextlib.suppress(OSError):  # another rank on this node may have removed it
                run_dir.rmdir()
    except OSError as error:
        return f"train.run_dir={run_dir} cannot be written here ({error.strerror}); every rank writes checkpoints to it"
    where = run_dir.absolute()
    return f"train.run_dir={run_dir} is {where} here and does not show a file that rank 0 wrote; {SHARED}"
