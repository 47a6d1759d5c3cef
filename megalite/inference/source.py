"""Opens the model to generate with or evaluate, and chooses its tp and pp. No torch: mistakes are reported first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megalite.checkpoint.contents import config_of, is_adapter
from megalite.checkpoint.folder import find, read_manifest
from megalite.config import Config, ConfigError, ModelConfig, ParallelConfig, Resolved, TrainConfig, check, resolve
from megalite.config.check import valid_tp
from megalite.config.dtypes import BY_CODE
from megalite.data.origin import tokenizer_of_run
from megalite.exchange.base import base_of
from megalite.exchange.hf_fields import read_json
from megalite.exchange.hf_folder import HFFolder, find_tokenizer, open_folder
from megalite.plan.topology import device_memory
from megalite.text.tokenizer import Tokenizer, load_tokenizer

TOKENIZERS = ("tokenizer.model", "tokenizer.json")


@dataclass(frozen=True)
class Source:
    """A model's weights and tokenizer, and the configuration to run it with (no dp, no sp).

    `weights`: a checkpoint, possibly of LoRA, or a Hugging Face folder. `start`: token ids at the start of a text.
    `stops`: ids that end one. `limit`: positions of the model, None: no bound.
    """

    weights: Path | HFFolder
    config: Resolved
    tokenizer: Tokenizer
    start: tuple[int, ...]
    stops: frozenset[int]
    limit: int | None


def open_source(
    path: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    world_size: int = 1,
    device: str = "auto",
    dtype: str | None = None,
    timeout_s: float = 600.0,
) -> Source:
    """Open a run folder, a checkpoint or a Hugging Face folder, for tp x pp = world_size ranks.

    `dtype`: of weights and activations; None: the run's, or that of the folder's weights. Raises ValueError.
    """
    hugging_face = (Path(path) / "config.json").is_file()
    source = _of_folder(Path(path), dtype) if hugging_face else _of_checkpoint(find(path), dtype)
    config, tokenizer = source.config, source.tokenizer
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but the model has {config.model.vocab_size}; replace "
            f"it with the model's own tokenizer"
        )
    tp, pp = _layout(config.model, tp, pp, world_size)
    parallel = ParallelConfig(tp=tp, pp=pp, sp=False, timeout_s=timeout_s)
    train = dataclasses.replace(config.train, device=device)
    config = resolve(Config(model=config.model, parallel=parallel, train=train), world_size)
    check(config, world_size)
    device_memory(device, world_size)  # raises if the GPU does not exist
    return dataclasses.replace(source, config=config)


def _of_checkpoint(folder: Path, dtype: str | None) -> Source:
    """The model by the checkpoint's manifest, and the tokenizer from the run folder."""
    manifest = read_manifest(folder)
    if is_adapter(manifest):
        base_of(folder)
    saved = config_of(manifest)
    run_dir = folder.parent.parent
    file = next((f for name in TOKENIZERS if (f := run_dir / name).is_file()), None)
    file = file or tokenizer_of_run(dataclasses.asdict(saved.data), run_dir)
    if file is None:
        raise ValueError(f"{run_dir} has no {' or '.join(TOKENIZERS)}; copy there the one that its data was made with")
    tokenizer = load_tokenizer(file)
    model, train = saved.model, saved.train
    kept = TrainConfig(dtype=dtype or train.dtype, seq_len=train.seq_len, kernels=train.kernels)
    # training joins documents with the end-of-document token, so a text follows one
    end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    start = end if tokenizer.bos_id is None or not _begins(saved) else (*end, tokenizer.bos_id)
    limit = model.learned_positions or None
    return Source(folder, resolve(Config(model=model, train=kept), 1), tokenizer, start, frozenset(end), limit)


def _begins(saved: Resolved) -> bool:
    """Whether the training documents were made with a BOS token, if the data still exists."""
    prefix = saved.data.path
    side = Path(f"{prefix}.json")
    return prefix is not None and side.is_file() and bool(read_json(side).get("prepend_bos"))


def _of_folder(path: Path, dtype: str | None) -> Source:
    """A Hugging Face folder; its tokenizer and generation_config.json define what begins and ends a text."""
    folder = open_folder(path)
    file = find_tokenizer(path)
    if file is None:
        raise ValueError(f"{path} has no {' or '.join(TOKENIZERS)}; download it again with its tokenizer")
    tokenizer = load_tokenizer(file)
    stops = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    for name in ("config.json", "generation_config.json"):
        found = read_json(path / name).get("eos_token_id") if (path / name).is_file() else None
        stops |= {each for each in (found if isinstance(found, list) else [found]) if isinstance(each, int)}
    stored = {tensor.dtype for tensor in folder.tensors.values()}
    one = BY_CODE[stored.pop()].name if len(stored) == 1 else "fp32"
    config = resolve(Config(model=folder.model, train=TrainConfig(dtype=dtype or one, seq_len=folder.context)), 1)
    return Source(folder, config, tokenizer, tokenizer.prefix, frozenset(stops), folder.context)


def _layout(model: ModelConfig, tp: int | None, pp: int | None, world_size: int) -> tuple[int, int]:
    """Return (tp, pp), deriving what is None from the number of ranks. Raises ConfigError if they do not match it."""
    if tp is None and pp is None:
        tp = max(size for size in valid_tp(model) if world_size % size == 0)
    if min(1 if tp is None else tp, 1 if pp is None else pp) < 1:
        raise ConfigError(f"tp={tp}, pp={pp}: both must be at least 1")
    tp, pp = tp or max(1, world_size // (pp or 1)), pp or max(1, world_size // (tp or 1))
    if tp * pp != world_size:
        start = f"start it with torchrun --nproc_per_node {tp * pp}" if tp * pp > 1 else "start it without torchrun"
        raise ConfigError(f"tp {tp} x pp {pp} = {tp * pp}, but the world size is {world_size}; {start}")
    return tp, pp
