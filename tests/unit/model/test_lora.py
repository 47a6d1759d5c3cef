"""LoRA's linears: what a pair of factors adds, and in which rows."""

import pytest
import torch
from decoders import MODEL, B

from megalite.config import Config, ParallelConfig, TuneConfig, resolve
from megalite.config.shapes import Projection
from megalite.model.context import Context
from megalite.model.cut_table import cut_model
from megalite.model.decoder import Decoder
from megalite.model.dropout import Dropout, keep_mask, sample_keys
from megalite.model.lora import LoraColumn, LoraRow, adapt, join
from megalite.parallel.groups import Group


def test_dropout_of_lora_is_that_of_the_formula() -> None:
    linear = torch.nn.Linear(6, 4, bias=False).double()
    of, alone = Projection("o", "o_proj", 4, 6), Group([0], 0)
    row = LoraRow(linear, alone, False, of, rank=2, scale=0.5, dropout=Dropout(0.4, 7)).double()
    pair = row.pairs["o"]
    torch.nn.init.normal_(pair.a)
    torch.nn.init.normal_(pair.b)
    x, keys = torch.randn(B, 5, 6, dtype=torch.float64), sample_keys(1, torch.arange(B))
    context = Context(torch.arange(5).expand(B, -1), keys=keys)
    kept = keep_mask(keys, 7, (B, 6, 5), 0.4).transpose(1, 2)
    expected = linear(x) + 0.5 * (x * kept / 0.6) @ pair.a.T @ pair.b.T
    assert torch.allclose(row(x, context), expected, rtol=1e-13)
    assert torch.allclose(row.eval()(x, context), linear(x) + 0.5 * x @ pair.a.T @ pair.b.T, rtol=1e-13)


def test_query_key_and_value_alternate_by_group() -> None:
    """Two groups of two queries, heads of one feature: rows [q q k v] of each group; what has no factors is zero."""
    rows = {"q": 4, "k": 2, "v": 2}
    q, v = torch.arange(1.0, 5), torch.tensor([10.0, 20.0])
    assert join({"q": q, "v": v}, rows, 1).tolist() == [1, 2, 0, 10, 3, 4, 0, 20]
    assert join({"k": v}, rows, 1).tolist() == [0, 0, 10, 0, 0, 0, 20, 0]


def test_gate_and_up_follow_each_other() -> None:
    up = torch.ones(2, 3)
    assert join({"up": up}, {"gate": 3, "up": 3}, 4).tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert join({"down": up}, {"down": 3}, 4) is up


def test_a_column_linear_adds_the_product_of_its_factors() -> None:
    """Of query and value alone, by the definition W x + scale · B A x, at tp 1."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(6, 8, bias=False).double()
    chosen = [Projection("q", "q_proj", 4, 6), Projection("v", "v_proj", 2, 6)]
    column = LoraColumn(
        linear,
        Group([0], 0),
        False,
        chosen,
        rank=3,
        scale=0.5,
        dropout=Dropout(0.0, 0),
        rows={"q": 4, "k": 2, "v": 2},
        head_dim=1,
    ).double()
    assert sorted(name for name, _ in column.named_parameters()) == [
        "lora_q.a",
        "lora_q.b",
        "lora_v.a",
        "lora_v.b",
        "weight",
    ]
    for pair in column.pairs.values():
        torch.nn.init.normal_(pair.a, generator=generator)
        torch.nn.init.normal_(pair.b, generator=generator)
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=generator)
    q, v = (0.5 * x @ pair.a.T @ pair.b.T for pair in column.pairs.values())
    nothing = torch.zeros(2, 5, 1, dtype=torch.float64)
    added = torch.cat([q[..., :2], nothing, v[..., :1], q[..., 2:], nothing, v[..., 1:]], -1)
    found = column(x, Context(torch.arange(5).expand(2, -1)))
    torch.testing.assert_close(found, linear(x) + added, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("targets", ["", "q_proj v_proj", "layers.1.mlp.down"])
def test_what_lora_targets_names_is_adapted_and_nothing_else(targets: str) -> None:
    tune = TuneConfig(mode="lora", lora_rank=3, lora_targets=targets)
    config = resolve(Config(model=MODEL, parallel=ParallelConfig(tp=1, pp=1), tune=tune), 1)
    with torch.device("meta"):
        decoder = Decoder(config.model, range(config.model.num_layers))
    plain = {name for name, _ in decoder.named_parameters()}
    cut_model(decoder, config.model, Group([0], 0), False)
    adapt(decoder, config, Group([0], 0))
    factors = {name: tuple(p.shape) for name, p in decoder.named_parameters() if name not in plain}
    assert factors == config.shapes.factors
    dropouts = [m.dropout.site for m in decoder.modules() if isinstance(m, LoraRow | LoraColumn)]
    # each linear draws masks of its own, and none the model's
    assert len(set(dropouts)) == len(dropouts) > 0
    assert min(dropouts) > 3 * config.model.num_layers
