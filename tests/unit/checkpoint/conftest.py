import pytest

from megalite.checkpoint import folder


@pytest.fixture
def any_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of a few tensors that belong to no model: for tests of the format, not of what has to be there."""
    monkeypatch.setattr(folder, "check_contents", lambda manifest: None)
