"""Compare transformers' logits for a Hugging Face folder with megalite's for a checkpoint."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.contents import config_of
from megalite.checkpoint.folder import find, read_manifest
from megalite.checkpoint.load import load
from megalite.exchange.hf_weights import placeholder
from megalite.model.context import Context
from megalite.model.decoder import Decoder
from megalite.model.init import materialise
from megalite.parallel.groups import Group

TOLERANCE = 1e-5
SEQUENCES, LENGTH = 2, 64


@dataclass(frozen=True)
class Verdict:
    """The largest difference of two logits in fp32, divided by the largest logit."""

    difference: float
    logit: float

    @property
    def relative(self) -> float:
        return self.difference / self.logit

    @property
    def equal(self) -> bool:
        return self.relative <= TOLERANCE

    def __str__(self) -> str:
        word = "verified" if self.equal else "DIFFERENT"
        return (
            f"{word}: largest difference of logits {self.difference:.3e}, of {self.logit:.3f}: relative "
            f"{self.relative:.3e}, allowed {TOLERANCE:.0e}, over {SEQUENCES} x {LENGTH} random tokens in fp32"
        )


def require_transformers() -> None:
    """Raise ValueError if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "--verify runs the model in transformers too, which is not installed; pip install transformers"
        )


@torch.inference_mode()
def verify(hf: Path, run: Path) -> Verdict:
    """Run both models in fp32 on the same random token ids, one after the other, so that one is in memory at a time."""
    require_transformers()
    vocabulary = config_of(read_manifest(find(run))).model.vocab_size
    tokens = torch.randint(vocabulary, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    theirs = _transformers_logits(hf, tokens)
    ours = load_decoder(run)(tokens, Context(torch.arange(LENGTH).expand(SEQUENCES, -1)))
    return Verdict(float((ours - theirs).abs().max()), float(theirs.abs().max()))


def load_decoder(run: Path) -> Decoder:
    """The whole model of a run folder or checkpoint on the CPU, in fp32, in eval mode."""
    step = find(run)
    manifest = read_manifest(step)
    model = config_of(manifest).model
    with torch.device("meta"):
        decoder = Decoder(model, range(model.num_layers), kernel="torch")
    shards = materialise(
        decoder,
        model,
        Group([0], 0),
        placeholder,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    load(step, manifest, shards, {"weight": dict(decoder.named_parameters())})
    return decoder.eval()


def _transformers_logits(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        # a local folder, and no code out of it
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, attn_implementation="sdpa"
        )
        logits: Tensor = model.eval()(tokens, use_cache=False).logits
    # transformers raises exceptions of many types for a folder it cannot load
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: transformers cannot run it ({type(error).__name__} {reason})") from None
    return logits
