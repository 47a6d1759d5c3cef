"""Makes the helper modules of this folder importable, and has fixtures that several of its tests share."""

import json
import sys
from pathlib import Path

import pytest

from megalite.text.tokenizer import Tokenizer, load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level byte-pair tokenizer.json whose config names its special tokens."""
    import tokenizers
    from chats import TEXTS
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("huggingface")
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(TEXTS * 3, trainer)
    built.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<end>", "bos_token": {"content": "<start>", "special": True}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.fixture(params=["tokenizer", "byte_level"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)
