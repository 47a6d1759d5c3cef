import sys
from pathlib import Path

import pytest

# the tests here share the small models of folders.py
sys.path.insert(0, str(Path(__file__).parent))
from folders import Make, write_folder


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The Hugging Face folder of a family; not to be changed."""
    made: dict[str, Path] = {}

    def _folder_of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            write_folder(made[family], family)
        return made[family]

    return _folder_of


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the Hugging Face folders of lora_runs.py are."""
    return tmp_path_factory.mktemp("hf")
