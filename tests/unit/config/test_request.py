"""A request: values can be replaced by section, and a key can be forgotten as the user's."""

import pytest

from megalite.config import Config, Request


@pytest.fixture
def request_() -> Request:
    explicit = frozenset({"train.steps", "optim.lr"})
    return Request(Config(), explicit, "tiny", print_config=False, dry_run=False)


def test_values_are_replaced_by_section(request_: Request) -> None:
    new = request_.replaced(train={"steps": 7, "seed": 3}, model={"num_layers": 2})
    assert (new.config.train.steps, new.config.train.seed, new.config.model.num_layers) == (7, 3, 2)
    assert new.config.optim is request_.config.optim
    assert (new.explicit, new.preset) == (request_.explicit, "tiny")
    assert request_.config == Config()
    with pytest.raises(TypeError):
        request_.replaced(train={"stepz": 7})


def test_a_forgotten_key_keeps_its_value(request_: Request) -> None:
    new = request_.replaced(train={"steps": 7}).forgetting("train.steps", "data.path")
    assert new.explicit == {"optim.lr"}
    assert new.config.train.steps == 7
