"""Tokens one at a time from a stage of a pipeline: a KV cache around its attention cores, the last token's logits.

A batch is padded on the left, so that its rows end at one column; bounds hide the padding, positions do not count it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from megalite.checkpoint.contents import is_adapter
from megalite.checkpoint.folder import read_manifest
from megalite.checkpoint.load import load
from megalite.engine.stage import Stage, build_stage
from megalite.exchange.hf_folder import HFFolder
from megalite.exchange.hf_weights import fill, placeholder
from megalite.exchange.merge import open_merged
from megalite.inference.reply import Reply, Settings
from megalite.inference.sampling import choose
from megalite.inference.source import Source
from megalite.model.attention import Attention
from megalite.model.context import Context
from megalite.model.decoder import Decoder
from megalite.parallel.groups import World

BLOCK = 256
"""Tokens by which a cache grows: copying it then costs little, and little of it is empty."""


class CachedCore(nn.Module):
    """An attention core with a cache of keys and values [2, b, capacity, kv, d]: each call brings only new tokens.

    `context.bounds` count from the first token in the cache; None only while it is empty.
    """

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.past: Tensor | None = None
        self.length = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        start, self.length = self.length, self.length + k.shape[1]
        if self.past is None or self.length > self.past.shape[2]:
            b, _, kv, d = k.shape
            grown = k.new_empty(2, b, -(-self.length // BLOCK) * BLOCK, kv, d)
            if self.past is not None:
                grown[:, :, :start] = self.past[:, :, :start]
            self.past = grown
        self.past[0, :, start : self.length], self.past[1, :, start : self.length] = k, v
        k, v = self.past[:, :, : self.length]
        out: Tensor = self.core(q, k, v, context)
        return out


class LastToken(nn.Module):
    """A loss head applied to the last token only: the logits of a long prompt can take more memory than the model."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, hidden: Tensor, context: Context, labels: Tensor | None = None, loss_mask: Tensor | None = None
    ) -> Tensor:
        out: Tensor = self.head(hidden[:, -1:], context)
        return out


@contextmanager
def decoding(models: Iterable[Decoder]) -> Iterator[None]:
    """Empty caches around the attention cores, and logits of the last token alone, until left."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_decoding(model))
        yield


@contextmanager
def _decoding(model: Decoder) -> Iterator[None]:
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    cores, head = [attention.core for attention in attentions], model.loss_head
    try:
        for attention in attentions:
            attention.core = CachedCore(attention.core)
        if head is not None:
            setattr(model, "loss_head", LastToken(head))  # noqa: B010 - the attribute is typed as what it is in training
        yield
    finally:
        for attention, core in zip(attentions, cores, strict=True):
            attention.core = core
        model.loss_head = head


def load_stage(source: Source, world: World) -> Stage:
    """This rank's part of the model, with its weights, into which LoRA's factors are merged.

    ValueError where they are damaged or of another model.
    """
    if isinstance(source.weights, HFFolder):
        stage = build_stage(source.config, world, placeholder)
        fill(stage.parameters, stage.shards, source.weights)
        return stage
    manifest = read_manifest(source.weights)
    if is_adapter(manifest):
        _, merged, _ = open_merged(source.weights)
        return build_stage(source.config, world, lambda name, _: merged(name))
    stage = build_stage(source.config, world, placeholder)
    load(source.weights, manifest, stage.shards, {"weight": dict(stage.parameters)})
    return stage


def decode(stage: Stage, prompts: Sequence[Sequence[int]], settings: Settings) -> Iterator[list[int]]:
    """The next token of every prompt, again and again, the same on every rank; who takes them says when it is enough.

    All ranks must take equally many. The last stage's tp rank 0 chooses.
    """
    mesh, device = stage.mesh, stage.mesh.device
    assert mesh.dp.size == 1
    assert not stage.config.parallel.sp
    chooser = mesh.world.size - mesh.tp.size
    width = max(len(prompt) for prompt in prompts)
    pad = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    seen = torch.zeros(len(prompts), stage.config.model.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = True
    generators = [torch.Generator().manual_seed(settings.seed + i) for i in range(len(prompts))]
    ragged, start = bool(pad.any()), 0
    # a row that has ended runs on beside the others, and must find a position
    last = (stage.config.model.max_positions or 2**31) - 1
    with decoding(stage.models.values()):
        while True:
            column = torch.arange(start, start + tokens.shape[1], device=device).expand(len(prompts), -1)
            positions = (column - pad[:, None]).clamp(0, last)
            bounds = None
            if ragged or start > 0:
                # a padded query sees itself: one that saw nothing would be NaN, and its value with it
                bounds = torch.stack([torch.minimum(pad[:, None], column), column + 1], -1)
            start += tokens.shape[1]
            logits = stage.logits(tokens, positions, bounds)
            chosen = torch.zeros(len(prompts), dtype=torch.long, device=device)
            if mesh.world.rank == chooser:
                assert logits is not None
                chosen.copy_(choose(logits[:, -1], seen, settings, generators))
            mesh.world.broadcast(chosen, chooser)
            seen.scatter_(1, chosen[:, None], True)
            yield chosen.tolist()
            tokens = chosen[:, None]


def stream(stage: Stage, replies: Sequence[Reply], settings: Settings) -> Iterator[tuple[int, str]]:
    """(number of the reply, text) as it comes, until every reply has ended."""
    for tokens in decode(stage, [reply.prompt for reply in replies], settings):
        for number, (reply, token) in enumerate(zip(replies, tokens, strict=True)):
            if not reply.ended:
                yield number, reply.push(token)
        if all(reply.ended for reply in replies):
            return
