"""The table of dtypes against what the schema offers."""

import dataclasses

from megalite.config import TrainConfig
from megalite.config.dtypes import BY_CODE, BY_TORCH, DTYPES


def test_train_dtype_offers_every_row() -> None:
    (field,) = [field for field in dataclasses.fields(TrainConfig) if field.name == "dtype"]
    assert tuple(field.metadata["choices"]) == tuple(DTYPES)


def test_names_codes_and_torchs_names_are_unique() -> None:
    assert len(DTYPES) == len(BY_CODE) == len(BY_TORCH)
    assert all(row.wide in DTYPES for row in DTYPES.values())
