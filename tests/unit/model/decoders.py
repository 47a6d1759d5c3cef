"""A small decoder whose weights are large enough that every part shows in its output."""

import torch
from models import tiny

from megalite.config import ResolvedModel
from megalite.model.decoder import Decoder

MODEL = tiny(vocab_size=31, num_layers=3, ffn_hidden_size=20, qkv_bias=True, qk_norm=True)
B, S = 2, 10


def make(model: ResolvedModel, **kwargs: object) -> Decoder:
    """A decoder with weights large enough that every part shows in the output."""
    torch.manual_seed(0)
    decoder = Decoder(model, kwargs.pop("layers", range(model.num_layers)), **kwargs).double()
    with torch.no_grad():
        for p in decoder.parameters():
            p.normal_(1.0 if p.dim() == 1 and p.numel() in (6, 24) else 0.0, 0.3)
    return decoder
