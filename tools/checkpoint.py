"""What can be done with a checkpoint: python tools/checkpoint.py convert --from hf DIR --to megalite NEW_DIR."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_convert(verbs)
    options = parser.parse_args()
    try:
        status: int = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


def add_convert(verbs: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    parser = verbs.add_parser("convert", help="from or to a Hugging Face folder; from Megatron-LM's old layout")
    parser.add_argument("--from", dest="source", nargs=2, required=True, metavar=("KIND", "DIR"),
                        help="hf DIR; megalite RUN or RUN/checkpoints/step-NNNNNNNN; megatron DIR")  # fmt: skip
    parser.add_argument("--to", dest="target", nargs=2, required=True, metavar=("KIND", "DIR"),
                        help="megalite DIR or hf DIR: a new folder")  # fmt: skip
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "fp64"), help="of all weights; else as stored")
    parser.add_argument("--shard-gb", type=float, default=2.0, metavar="N", help="to hf: largest file, at most 5")
    parser.add_argument("--verify", action="store_true", help="then run both sides in fp32 and compare their logits")
    parser.add_argument("--allow-pickle", action="store_true", help="megatron: open its .pt files, as tensors only")
    parser.set_defaults(run=convert)


def convert(options: argparse.Namespace) -> int:
    """Write the new folder; exit status 1 where --verify finds that the two sides compute differently."""
    (there, source), (here, target) = options.source, options.target
    ways = ("hf to megalite", "megalite to hf", "megatron to megalite")
    way = f"{there} to {here}"
    if way not in ways:
        raise ValueError(f"convert from {way}: there is {', '.join(ways)}")
    if not 0 < options.shard_gb <= 5:
        raise ValueError(f"--shard-gb {options.shard_gb} must be greater than 0 and at most 5")
    if options.verify:
        if there == "megatron":
            raise ValueError("--verify needs a Hugging Face folder on one side; convert to hf and verify that")
        from megalite.hf.verify import require_transformers

        require_transformers()
    if there == "hf":
        from megalite.hf.convert import from_hf_folder

        written = from_hf_folder(Path(source), Path(target), options.dtype)
    elif there == "megatron":
        from megalite.hf.megatron import from_megatron

        written = from_megatron(Path(source), Path(target), options.allow_pickle, options.dtype)
    else:
        from megalite.hf.convert import to_hf_folder

        written = to_hf_folder(Path(source), Path(target), options.dtype, int(options.shard_gb * 10**9))
    print(f"wrote {written}")
    if options.verify:
        from megalite.hf.verify import verify

        hf, megalite = (source, target) if there == "hf" else (target, source)
        found = verify(Path(hf), Path(megalite))
        print(found)
        return 0 if found.equal else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
