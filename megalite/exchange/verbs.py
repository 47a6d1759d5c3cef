"""The verbs merge and convert of tools/checkpoint.py. What needs torch is imported when a command needs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megalite.config.dtypes import DTYPES

# argparse's class is generic in its type stubs only
Verbs = Any


def add_merge(verbs: Verbs) -> None:
    parser = verbs.add_parser("merge", help="merge LoRA factors into their base, as a run folder of whole weights")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="a LoRA run or one of its checkpoints")
    parser.add_argument("target", type=Path, metavar="DST", help="a new folder, at step 0, in the base's dtypes")
    base = "the base now: a run, a checkpoint or a Hugging Face folder (default: the path at training)"
    parser.add_argument("--base", type=Path, metavar="DIR", help=base)
    parser.set_defaults(run=merge)


def merge(options: argparse.Namespace) -> int:
    """Write the new run folder."""
    from megalite.exchange.adapter import merge_adapter

    print(f"wrote {merge_adapter(options.adapter, options.target, options.base)}")
    return 0


def add_convert(verbs: Verbs) -> None:
    parser = verbs.add_parser("convert", help="convert from or to a Hugging Face or peft folder, or from Megatron-LM")
    parser.add_argument("--from", dest="source", nargs=2, required=True, metavar=("KIND", "DIR"),
                        help="hf, peft or megatron DIR; megalite RUN or RUN/checkpoints/step-NNNNNNNN")  # fmt: skip
    parser.add_argument("--to", dest="target", nargs=2, required=True, metavar=("KIND", "DIR"),
                        help="megalite DIR, hf DIR or (of a LoRA run) peft DIR: a new folder")  # fmt: skip
    base = "from peft: the run or Hugging Face folder the adapter is for; to peft: the base's name for peft"
    parser.add_argument("--base", metavar="DIR", help=base)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="dtype of all weights (default: as stored)")
    parser.add_argument(
        "--shard-gb", type=float, default=2.0, metavar="N", help="to hf: size of the largest file, at most 5"
    )
    parser.add_argument("--verify", action="store_true", help="also run both models in fp32 and compare their logits")
    parser.add_argument("--allow-pickle", action="store_true", help="from megatron: open .pt files, for tensors only")
    parser.set_defaults(run=convert)


def convert(options: argparse.Namespace) -> int:
    """Write the new folder; exit status 1 if --verify finds that the two models compute differently."""
    (there, _), (here, _) = options.source, options.target
    ways = ("hf to megalite", "megalite to hf", "megalite to peft", "peft to megalite", "megatron to megalite")
    if f"{there} to {here}" not in ways:
        raise ValueError(f"convert from {there} to {here} is not supported; use one of {', '.join(ways)}")
    if not 0 < options.shard_gb <= 5:
        raise ValueError(f"--shard-gb {options.shard_gb} must be greater than 0 and at most 5")
    if "peft" in (there, here) and (options.dtype or options.verify):
        raise ValueError("--dtype and --verify are for whole weights; merge the adapter first")
    if options.base and "peft" not in (there, here):
        raise ValueError(f"--base {options.base} is for peft; `merge` takes one too")
    if options.verify:
        if there == "megatron":
            raise ValueError("--verify needs a Hugging Face folder on one side; convert to hf and verify that")
        from megalite.exchange.hf_verify import require_transformers

        require_transformers()
    from megalite.exchange.hf_folder import find_tokenizer, open_folder, require_new

    # these need no torch, and find most mistakes
    require_new(Path(options.target[1]), "target")
    if there == "hf":
        open_folder(options.source[1])
    print(f"wrote {write_converted(options)}")
    if here == "hf" and find_tokenizer(Path(options.target[1])) is None:
        print("note: the folder has no tokenizer, since the run and its data have none; copy tokenizer.json into it")
    if options.verify:
        from megalite.exchange.hf_verify import verify

        hf, megalite = (options.source, options.target) if there == "hf" else (options.target, options.source)
        found = verify(Path(hf[1]), Path(megalite[1]))
        print(found)
        return 0 if found.equal else 1
    return 0


def write_converted(options: argparse.Namespace) -> Path:
    """Write the new folder by the conversion that --from and --to name. Returns its path."""
    (there, source), (here, target) = ((kind, Path(path)) for kind, path in (options.source, options.target))
    if there == "hf":
        from megalite.exchange.convert import from_hf_folder

        return from_hf_folder(source, target, options.dtype)
    if there == "megatron":
        from megalite.exchange.megatron import from_megatron

        return from_megatron(source, target, options.allow_pickle, options.dtype)
    if here == "hf":
        from megalite.exchange.convert import to_hf_folder

        return to_hf_folder(source, target, options.dtype, int(options.shard_gb * 10**9))
    from megalite.exchange.adapter import export_peft, import_peft

    if here == "peft":
        return export_peft(source, target, options.base)
    if options.base is None:
        raise ValueError("convert from peft: name the run or Hugging Face folder the adapter is for with --base DIR")
    return import_peft(source, Path(options.base), target)
