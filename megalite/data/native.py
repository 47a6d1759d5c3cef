"""The compiled reader of indexed token files, with IndexedDataset's interface, and the choice between the two."""

import functools
import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from megalite.data.indexed import IndexedDataset, paths

_log = logging.getLogger(__name__)


def compiled() -> ModuleType | None:
    """Return the module megalite._index, or None if it is not built."""
    try:
        return importlib.import_module("megalite._index")
    except ModuleNotFoundError:
        return None


@functools.cache
def preferred() -> bool:
    """Whether reader="auto" uses the compiled reader; the choice is logged once."""
    built = compiled() is not None
    _log.info("reading token files with %s", "megalite._index" if built else "numpy (megalite._index is not built)")
    return built


class NativeDataset(IndexedDataset):
    """An IndexedDataset whose checks and copies are done in C++. Raises ValueError if megalite._index is not built."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path, self.idx_path, self.sidecar_path = paths(prefix)
        module = compiled()
        if module is None:
            raise ValueError(
                'reader="cpp": megalite._index is not built; build it with '
                '`pip install --no-build-isolation --no-deps -e .` or use reader="numpy"'
            )
        self._reader = module.Reader(str(prefix))
        self.dtype = self._reader.dtype
        self.num_sequences = self._reader.num_sequences
        self.num_documents = self._reader.num_documents
        self.num_tokens = self._reader.num_tokens
        self.lengths = self._reader.lengths
        self.offsets = self._reader.offsets
        self.documents = self._reader.documents
        self._contiguous = self._reader.contiguous

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        tokens: NDArray[Any] = self._reader.tokens(start, stop)
        return tokens

    def max_token(self) -> int:
        return int(self._reader.max_token())

    def __getitem__(self, sequence: int) -> NDArray[Any]:
        tokens: NDArray[Any] = self._reader[sequence]
        return tokens


def open_indexed(prefix: str | Path, reader: str = "auto") -> IndexedDataset:
    """Open `prefix.{bin,idx}`.

    reader: "numpy", "cpp" (the compiled reader), or "auto": the compiled reader if it is built, else numpy.

    Raises ValueError if the files are missing or damaged, or the reader is unknown or not built.
    """
    if reader not in ("auto", "numpy", "cpp"):
        raise ValueError(f'reader={reader!r} is unknown; use "auto", "numpy" or "cpp"')
    use_native = reader == "cpp" or (reader == "auto" and preferred())
    return NativeDataset(prefix) if use_native else IndexedDataset(prefix)
