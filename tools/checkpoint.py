"""Inspect, verify, compare, convert and prune checkpoints.

PATH is a run folder, which means its newest checkpoint, or one of its checkpoints/step-NNNNNNNN. Checkpoints of every
topology work: each holds whole tensors, in blocks. Exit status: 0 for success; 1 if something is damaged or different;
2 if a command cannot be carried out.
"""

import argparse
import fnmatch
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.checkpoint.describe import describe, describe_lines, many, size
from megalite.checkpoint.folder import complete, find, read_manifest
from megalite.checkpoint.manifest import Damaged, Removed
from megalite.exchange.verbs import Verbs, add_convert, add_merge
from megalite.launch.arguments import Parser

EXAMPLES = """examples:
  python tools/checkpoint.py info runs/tiny
  python tools/checkpoint.py info runs/tiny --tensors 'layers.0.*'
  python tools/checkpoint.py verify runs/tiny
  python tools/checkpoint.py diff runs/a runs/b --kinds weight
  python tools/checkpoint.py convert --from hf SmolLM2-135M --to megalite runs/smol
  python tools/checkpoint.py convert --from megalite runs/lora --to peft adapter
  python tools/checkpoint.py merge runs/lora runs/merged
  python tools/checkpoint.py consolidate runs/tiny released --weights-only
  python tools/checkpoint.py prune runs/tiny --keep 2 --keep-every 1000 --dry-run
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (add_info, add_verify, add_diff, add_convert, add_merge, add_consolidate, add_prune):
        add(verbs)
    options = parser.parse_args(argv)
    try:
        status: int = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


def add_info(verbs: Verbs) -> None:
    parser = verbs.add_parser("info", help="show what a checkpoint holds; of a run folder, also list its checkpoints")
    parser.add_argument("path", type=Path, metavar="PATH")
    names = "list tensors with shape, dtype and blocks; PATTERN, as 'layers.0.*', selects by full name"
    parser.add_argument("--tensors", nargs="?", const="*", metavar="PATTERN", help=names)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=info)


def info(options: argparse.Namespace) -> int:
    """Print the manifest's summary; no tensor is read."""
    folder = find(options.path)
    manifest = read_manifest(folder)
    what = describe(folder, manifest)
    if folder != options.path:
        what["checkpoints"] = [str(path) for path in complete(options.path)]
    if options.tensors is not None:
        listed = {n: t for n, t in manifest["tensors"].items() if fnmatch.fnmatchcase(n, f"*{options.tensors}*")}
        if not listed:
            raise ValueError(f"{folder} has no tensor that matches {options.tensors}; --tensors alone lists all")
        what["tensors"] = {n: {**t, "blocks": len(t["blocks"])} for n, t in listed.items()}
    if options.json:
        print(json.dumps(what, indent=1, ensure_ascii=False))
        return 0
    print("\n".join(describe_lines(what)))
    if "checkpoints" in what:
        names = [Path(path).name for path in what["checkpoints"]]
        print(f"  {'run':<10} {many(len(names), 'checkpoint')}: {', '.join(names)}")
    for name, tensor in what.get("tensors", {}).items():
        print(f"  {name}  {tensor['shape']}  {tensor['dtype']}  {many(tensor['blocks'], 'block')}")
    return 0


def add_verify(verbs: Verbs) -> None:
    parser = verbs.add_parser("verify", help="read every block and compare it with its checksum")
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="of a run folder, every checkpoint")
    parser.set_defaults(run=verify)


def verify(options: argparse.Namespace) -> int:
    """Print a line for each damaged block; exit status 1 if there is any."""
    from megalite.checkpoint.verify import verify as verify_blocks

    folders = [f for path in options.paths for f in (complete(path) if find(path) != path else [path])]
    status = 0
    for folder in folders:
        began = time.monotonic()
        try:
            manifest = read_manifest(folder)
            found = verify_blocks(folder, manifest)
        except Damaged as error:
            print(f"damaged  {error}")
            status = 1
            continue
        except Removed as error:
            if folder in options.paths:
                raise
            print(f"removed  {error}")
            continue
        seconds = time.monotonic() - began
        for line in found.damages:
            print(f"damaged  {line}")
        outcome = many(len(found.damages), "damage") if found.damages else "good"
        weights_only = all(name.startswith("weight.") for name in manifest["tensors"])
        tensors, speed = len(manifest["tensors"]), found.bytes / max(seconds, 1e-9) / 1e9
        amount = f"{many(tensors, 'tensor')} in {many(found.blocks, 'block')}, {size(found.bytes)} read"
        amount += ", weights without optimizer state," if weights_only else ""
        print(f"{outcome}  {folder}: {amount} in {seconds:.2f} s, {speed:.2f} GB/s", flush=True)
        status = 1 if found.damages else status
    return status


def add_diff(verbs: Verbs) -> None:
    parser = verbs.add_parser("diff", help="show which tensors of two checkpoints differ, and by how much")
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument(
        "--kinds", nargs="+", default=[], metavar="KIND", help="compare only these: weight, exp_avg, ..."
    )
    parser.set_defaults(run=diff)


def diff(options: argparse.Namespace) -> int:
    """Print differences of state, configuration and tensors; exit status 1 if tensors differ."""
    a, b = ((folder, read_manifest(folder)) for folder in (find(options.a), find(options.b)))
    from megalite.checkpoint.compare import compare, differing_values
    from megalite.checkpoint.describe import state_of

    kinds = {name.partition(".")[0] for _, manifest in (a, b) for name in manifest["tensors"]}
    if unknown := sorted(set(options.kinds) - kinds):
        raise ValueError(f"--kinds {' '.join(unknown)}: neither has such tensors; use {', '.join(sorted(kinds))}")
    print(f"a  {a[0]}\nb  {b[0]}")
    for what, x, y in (
        ("state", state_of(a[1]), state_of(b[1])),
        ("config", a[1]["config"], b[1]["config"]),
    ):
        for key, left, right in differing_values(x, y):
            print(f"{what:<8} {key}: {left} in a, {right} in b")
    count = unlike = 0
    for _name, difference in compare(a, b, options.kinds):
        count += 1
        if difference:
            unlike += 1
            print(f"tensor   {difference}", flush=True)
    print(f"{unlike} of {count} tensors differ" if unlike else f"equal: all {count} tensors, bit for bit")
    return 1 if unlike else 0


def add_consolidate(verbs: Verbs) -> None:
    parser = verbs.add_parser("consolidate", help="rewrite a checkpoint, each tensor whole, as a new run folder")
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST", help="a new folder, to generate or resume from")
    parser.add_argument("--weights-only", action="store_true", help="leave out the optimizer's tensors")
    parser.set_defaults(run=consolidate)


def consolidate(options: argparse.Namespace) -> int:
    """Write the new run folder."""
    source = find(options.source)
    manifest = read_manifest(source)
    if options.target.exists():
        raise ValueError(f"{options.target} exists; name a new folder")
    from megalite.checkpoint.consolidate import consolidate as write

    new = write(source, manifest, options.target, options.weights_only)
    what = describe(new, read_manifest(new))
    print(f"wrote {new}: {size(what['bytes'])} in {many(len(what['files']), 'file')}")
    return 0


def add_prune(verbs: Verbs) -> None:
    parser = verbs.add_parser("prune", help="remove old checkpoints of a run")
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    parser.add_argument("--keep", type=int, required=True, metavar="N", help="newest checkpoints to keep, at least 1")
    parser.add_argument(
        "--keep-every", type=int, default=0, metavar="M", help="also keep those whose step is a multiple of M"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be removed, and remove nothing")
    parser.set_defaults(run=prune)


def prune(options: argparse.Namespace) -> int:
    """Remove old checkpoints after verifying the newest; if that is damaged, none is removed."""
    from megalite.checkpoint import lock
    from megalite.checkpoint.retain import surplus

    if options.keep < 1 or options.keep_every < 0:
        raise ValueError(f"--keep {options.keep} must be at least 1, and --keep-every {options.keep_every} at least 0")
    folders = complete(options.run_dir)
    if not folders:
        raise ValueError(f"{options.run_dir} is not a run folder with checkpoints; name one, e.g. runs/tiny")
    removed = surplus(folders, options.keep, options.keep_every)
    if options.dry_run:
        return remove_all(removed, folders, dry_run=True)
    lock.hold(options.run_dir)
    try:
        return remove_all(removed, folders, dry_run=False)
    finally:
        lock.release(options.run_dir)


def remove_all(removed: Sequence[Path], folders: Sequence[Path], dry_run: bool) -> int:
    """Remove the checkpoints `removed`, of `folders`, all of a run's, and print each; with `dry_run` only print."""
    from megalite.checkpoint.retain import remove
    from megalite.checkpoint.verify import require_good

    if removed:
        require_good(folders[-1], read_manifest(folders[-1]))
        print(f"verified {folders[-1]}")
    total = 0
    for folder in removed:
        taken = sum(path.lstat().st_size for path in folder.rglob("*"))
        total += taken
        if not dry_run:
            remove(folder)
        print(f"{'would remove' if dry_run else 'removed'} {folder}: {size(taken)}", flush=True)
    verb = "would be removed" if dry_run else "removed"
    print(f"{len(removed)} of {len(folders)} checkpoints {verb}, {size(total)}; {len(folders) - len(removed)} kept")
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback in `... | head`
    sys.exit(main())
