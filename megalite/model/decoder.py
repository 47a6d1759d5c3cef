"""A decoder written as if for one device: no group, no rank, no collective.

Parallelism and kernels change it by replacing named modules: the linears `qkv`, `out`, `gate_up` (or `up`), `down` and
`head`, the embeddings `embed` and `pos_embed`, the attention `core`, and the `cross_entropy` of the loss head; dropouts
are given the number of their part. What a forward pass needs besides hidden states is one `Context`. A pipeline stage
is the same model without the layers it does not own, so parameter names are the same at every topology.

By its configuration it is Llama (Touvron et al. 2023), GPT-2 (Radford et al. 2019) or one of their relatives; each
option is one line of docs/model-options.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite import ops
from megalite.config import ResolvedModel
from megalite.model.attention import Attention, rope_scaling
from megalite.model.context import Context
from megalite.model.dropout import Dropout
from megalite.model.layers import Linear, make_mlp, make_norm
from megalite.model.recompute import KINDS, recomputed


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), with dropout on each summand; [b, s, h] -> [b, s, h].

    `recompute`: backward runs the block again instead of keeping its activations. A subclass that computes something
    else overrides `compute`.
    """

    def __init__(self, c: ResolvedModel, kernel: str, layer: int) -> None:
        super().__init__()
        # places of dropout are numbered over the whole model; 0 is the embedding's
        self.attn_norm = make_norm(c)
        self.attn = Attention(c, kernel, site=3 * layer + 1)
        self.attn_dropout = Dropout(c.dropout, site=3 * layer + 2)
        self.mlp_norm = make_norm(c)
        self.mlp = make_mlp(c)
        self.mlp_dropout = Dropout(c.dropout, site=3 * layer + 3)
        self.recompute = False

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return recomputed(self.compute, x, context) if self.recompute else self.compute(x, context)

    def compute(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn_dropout(self.attn(self.attn_norm(x), context), context)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x), context), context)


class CrossEntropy(nn.Module):
    """Σ mask · (−log softmax(logits)[label]) over logits [b, s, vocab], in at least fp32.

    In training, the share `label_smoothing` of each label is spread evenly over the vocabulary (Szegedy et al. 2016,
    section 7).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        smoothing = self.label_smoothing if self.training else 0.0
        ce = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=smoothing)
        return (ce.view_as(labels) * loss_mask).sum()

    def whole(self, logits: Tensor) -> Tensor:
        """Logits over the whole vocabulary: here they are already."""
        return logits


class LossHead(nn.Module):
    """Final norm and output head: hidden [b, s, h] -> named sums, or without labels -> logits [b, s, vocab].

    `sums` are the names of what it sums over a batch: scalars, of which backward starts from `loss`.
    """

    sums = ("loss",)

    def __init__(self, norm: nn.Module, head: Linear, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.norm, self.head = norm, head
        self.cross_entropy = CrossEntropy(label_smoothing)

    def forward(
        self, hidden: Tensor, context: Context, labels: Tensor | None = None, loss_mask: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        logits = self.head(self.norm(hidden), context)
        if labels is None:
            return self.cross_entropy.whole(logits)
        return {"loss": self.cross_entropy(logits, labels, loss_mask)}


HEADS = {"next-token": LossHead}
"""What can end the model, by the name under which an objective asks for it."""


class Decoder(nn.Module):
    """The layers `layers` of the model; `first` has the embeddings, `last` the loss head, which `head` of HEADS names.

    The whole model is `Decoder(config, range(config.num_layers))`. A subclass may have another `block`
    (docs/extending.md).
    """

    block: type[Block] = Block

    def __init__(
        self,
        c: ResolvedModel,
        layers: Sequence[int],
        first: bool = True,
        last: bool = True,
        kernel: str = "auto",
        label_smoothing: float = 0.0,
        head: str = "next-token",
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head={head} is not supported; use {', '.join(HEADS)}")
        # 0: no rotation, positions are learned
        self.rot_dim = int(c.head_dim * c.rope_fraction) if c.position == "rope" else 0
        self.rope_theta, self.rope_scaling = c.rope_theta, rope_scaling(c)
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size) if first else None
        self.pos_embed: nn.Embedding | None = None
        if first and c.position == "learned":
            self.pos_embed = nn.Embedding(c.learned_positions, c.hidden_size)
        self.dropout = Dropout(c.dropout, site=0) if first else None
        self.layers = nn.ModuleDict({str(layer): self.block(c, kernel, layer) for layer in layers})
        self.loss_head = None
        self.tied = c.tie_embeddings and first and last
        if last:
            output = Linear(c.hidden_size, c.vocab_size, bias=False)
            if self.tied and self.embed is not None:
                output.weight = self.embed.weight
            self.loss_head = HEADS[head](make_norm(c), output, label_smoothing)

    def set_recompute(self, kind: str, layers: int) -> None:
        """Let the first `layers` blocks (0: all) keep fewer activations.

        kind: none; selective: the attention core keeps its inputs only; full: a block keeps its input only. Blocks and
        cores may be cut, adapted or replaced before or after this call. ValueError: an unknown kind.
        """
        if kind not in KINDS:
            raise ValueError(f"recompute={kind} is not supported; use {', '.join(KINDS)}")
        for number, block in enumerate(self.layers.values()):
            assert isinstance(block, Block)
            chosen = layers == 0 or number < layers
            block.recompute = chosen and kind == "full"
            block.attn.recompute = chosen and kind == "selective"

    def forward(
        self, x: Tensor, context: Context, labels: Tensor | None = None, loss_mask: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Tokens [b, s] (first stage) or hidden states [b, s, h] -> hidden states, or the result of the loss head.

        labels, loss_mask: [b, s], for the loss; without labels the loss head returns logits. ValueError: the context
        holds a field that this model does not support.
        """
        if context.index is not None or context.extra:
            raise ValueError("Context.index and Context.extra are not supported by this model; leave them out")
        if self.embed is not None:
            x = self.embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed(context.positions)
        if self.dropout is not None:
            x = self.dropout(x, context)
        if self.rot_dim and context.rope is None:
            wide = torch.promote_types(x.dtype, torch.float32)
            rope = ops.rope_cos_sin(context.positions, self.rot_dim, self.rope_theta, wide, self.rope_scaling)
            context = replace(context, rope=rope)
        for block in self.layers.values():
            x = block(x, context)
        if self.loss_head is None:
            return x
        # autograd adds the two gradients of a tied weight before it accumulates them, so neither may come later
        return self.loss_head(x, replace(context, deferred=None) if self.tied else context, labels, loss_mask)
