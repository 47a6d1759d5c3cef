"""Parameter groups: patterns of names, the first that fits; what cannot be read or fits nothing is told in one line."""

import pytest

from megalite.config import ConfigError, OptimConfig
from megalite.config.param_groups import check_groups, group_settings, parse_groups

NAMES = ["embed.weight", "layers.0.attn.qkv.weight", "layers.0.attn_norm.weight", "layers.1.attn.qkv.weight"]
CONFIG = OptimConfig(
    groups="layers.0.* lr_scale=0.5; *norm.weight weight_decay=0.2;; *.qkv.* weight_decay=0 lr_scale=2;"
)


def test_the_first_pattern_that_fits_counts() -> None:
    check_groups(CONFIG, NAMES)
    matrix = [True, True, False, True]
    found = {name: group_settings(CONFIG, name, is_matrix) for name, is_matrix in zip(NAMES, matrix)}
    assert found == {
        "embed.weight": (1.0, 0.1),
        "layers.0.attn.qkv.weight": (0.5, 0.1),
        "layers.0.attn_norm.weight": (0.5, 0.0),
        "layers.1.attn.qkv.weight": (2.0, 0.0),
    }
    assert group_settings(CONFIG, "loss_head.norm.weight", False) == (1.0, 0.2)


def test_none_is_none() -> None:
    assert parse_groups(OptimConfig().groups) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embed.* lr=0.1", "optim.groups: 'lr=0.1' of pattern 'embed.*' is not a setting; write e.g."),
        ("embed.* lr_scale=-1", "lr_scale=-1 of pattern embed.* must be 0, or at least 1e-6 and at most 1000"),
        ("embed.* lr_scale=nan", "'lr_scale=nan' of pattern"),
        ("embed.* lr_scale=inf", "lr_scale=inf of pattern embed.* must be"),
        ("embed.* lr_scale=1 lr_scale=2", "optim.groups: lr_scale of pattern embed.* is set twice; keep one"),
        ("embed.* lr_scale", "'lr_scale' of pattern"),
        ("embed.*", "optim.groups: pattern 'embed.*' sets nothing; add lr_scale or weight_decay=NUMBER"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_groups(text)
    assert message in str(error.value)


def test_a_pattern_that_fits_nothing_names_the_nearest() -> None:
    config = OptimConfig(groups="embedding.weight lr_scale=0")
    with pytest.raises(ConfigError, match=r"no parameter is named embedding.weight; did you mean embed.weight\?"):
        check_groups(config, NAMES)
