"""Activation recomputation: run a part of the forward again in backward instead of keeping what it made.

Chen et al. 2016 (whole blocks); selective recomputation of the attention core: Korthikanti et al. 2022, section 5.
"""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from megalite.model.decoder import Block, Decoder


def recompute(decoder: Decoder, kind: str, layers: int) -> None:
    """Let the first `layers` blocks of a stage (0: all) keep less, in place; call it last, on the cut model.

    `kind`: none; selective, the attention core keeps its inputs alone; full, a block does. Names of parameters stay,
    and so does every bit of loss and gradients: the same operations run on the same inputs. Collectives in what runs
    again meet, since all ranks of a tp group have the same layers.
    """
    if kind == "none":
        return
    for block in list(decoder.layers.values())[: layers or None]:
        assert isinstance(block, Block)
        module = block if kind == "full" else block.attn.core
        # dropout is a function of keys, so no generator's state has to be put back
        again = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
        module.forward = again  # type: ignore[method-assign]
