import sys
from pathlib import Path

import pytest

# the parity tests share the batches and tolerances of test_parity.py
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def any_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of a few tensors, or none, that belong to no model: for tests that ask for something else."""
    from megalite.checkpoint import folder

    monkeypatch.setattr(folder, "check_contents", lambda manifest: None)
