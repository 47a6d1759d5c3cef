import pytest

from megalite.doctor import ranks


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests independent of this machine's name server and cluster."""
    monkeypatch.setattr(ranks, "addresses", lambda host, timeout_s: ["127.0.0.1"])
    monkeypatch.setattr(ranks.shutil, "which", {"torchrun": "/bin/torchrun"}.get)
