import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megalite.data.corpus import Corpus, prepare
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.text.tokenizer import Tokenizer, load_tokenizer

# tests of other folders share the batches and tolerances of engine/parity.py
sys.path.insert(0, str(Path(__file__).parent / "engine"))
pytest.register_assert_rewrite("parity")
CORPUS = Path(__file__).parents[2] / "examples" / "corpus"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(CORPUS, tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer(corpus: Corpus) -> Tokenizer:
    return load_tokenizer(corpus.tokenizer)


@pytest.fixture(scope="session")
def read_prompts() -> Callable[[Path], list[str]]:
    """How tools/generate.py reads its file of prompts."""
    spec = importlib.util.spec_from_file_location("generate_tool", CORPUS.parents[1] / "tools" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    found: Callable[[Path], list[str]] = tool.read_prompts
    return found


@pytest.fixture
def write(tmp_path: Path):
    """Writes documents, each one sequence of tokens, and opens them."""

    def _write(*documents: list[int], vocab_size: int = 1000, name: str = "some") -> IndexedDataset:
        with IndexedWriter(tmp_path / name, vocab_size) as writer:
            for tokens in documents:
                writer.add_document(tokens)
        return IndexedDataset(tmp_path / name)

    return _write


@pytest.fixture
def noise(write) -> IndexedDataset:
    """30 documents of 0 to 49 random tokens below 40."""
    random = np.random.default_rng(0)
    return write(*(random.integers(40, size=random.integers(50)).tolist() for _ in range(30)), name="noise")


@pytest.fixture
def any_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of a few tensors, or none, that belong to no model: for tests that ask for something else."""
    from megalite.checkpoint import folder

    monkeypatch.setattr(folder, "check_contents", lambda manifest: None)
