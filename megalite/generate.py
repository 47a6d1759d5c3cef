"""Text from a checkpoint: a model on one process, a KV cache around its attention cores, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megalite.build import DTYPES
from megalite.checkpoint.folder import find, read_manifest
from megalite.checkpoint.load import load
from megalite.config import Config, from_mapping
from megalite.config.load import read_yaml_file
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.model.attention import Attention
from megalite.model.decoder import Decoder
from megalite.model.init import materialise
from megalite.parallel.groups import Group


class CachedCore(nn.Module):
    """An attention core that remembers keys and values [b, s, kv, d], so that each call brings only new tokens."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.past: tuple[Tensor, Tensor] | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, bounds: Tensor | None, keys: Tensor | None = None
    ) -> Tensor:
        if self.past is not None:
            k, v = torch.cat([self.past[0], k], dim=1), torch.cat([self.past[1], v], dim=1)
            last = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device) + 1
            bounds = torch.stack([torch.zeros_like(last), last], dim=-1).expand(q.shape[0], -1, -1)
        self.past = (k, v)
        out: Tensor = self.core(q, k, v, positions, bounds, keys)
        return out


def load_model(path: str | Path, device: str = "cpu") -> tuple[Decoder, Tokenizer, Config]:
    """The whole model of a run folder or checkpoint on one device, its tokenizer, and the run's configuration.

    ValueError where the folder has no checkpoint or no tokenizer.
    """
    folder = find(path)
    run_dir = folder.parent.parent
    manifest = read_manifest(folder)
    config = from_mapping(read_yaml_file(run_dir / "config.yaml"), str(run_dir / "config.yaml"))
    found = [run_dir / name for name in ("tokenizer.model", "tokenizer.json") if (run_dir / name).is_file()]
    if not found:
        raise ValueError(f"{run_dir} has no tokenizer.model or tokenizer.json; copy the one its data was made with")
    with torch.device("meta"):
        model = Decoder(config.model, range(config.model.num_layers), kernel=config.train.kernels)
    alone = Group([0], 0)
    shards = materialise(
        model,
        config.model,
        alone,
        lambda _, shape: torch.zeros(shape),
        dtype=DTYPES[config.train.dtype],
        device=torch.device(device),
    )
    load(folder, manifest, shards, {"weight": dict(model.named_parameters())})
    return model.eval(), load_tokenizer(found[0]), config


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Token ids that continue `prompt`, one by one, until `eos_id` or `max_new_tokens`.

    temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary (nucleus: Holtzman et al. 2020, section 3.1).
    """
    if not prompt:
        raise ValueError("the prompt has no token; give at least one, e.g. the end-of-document token")
    if model.pos_embed is not None and len(prompt) + max_new_tokens > model.pos_embed.num_embeddings:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones are more than the model's "
            f"{model.pos_embed.num_embeddings} positions (model.max_positions); ask for fewer"
        )
    for attention in [module for module in model.modules() if isinstance(module, Attention)]:
        core = attention.core
        attention.core = CachedCore(core.core if isinstance(core, CachedCore) else core)
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens, start = torch.tensor([list(prompt)], device=device), 0
    for _ in range(max_new_tokens):
        positions = torch.arange(start, start + tokens.shape[1], device=device).unsqueeze(0)
        logits = model(tokens, positions)[0, -1].float()
        start += tokens.shape[1]
        choice = int(sample(logits, temperature, top_k, top_p, generator))
        if choice == eos_id:
            return
        yield choice
        tokens = torch.tensor([[choice]], device=device)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One id drawn from logits [vocab]."""
    if temperature == 0:
        return logits.argmax()
    logits = logits / temperature
    if 0 < top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(0, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[0]
