"""Read weights from a Hugging Face folder: whole parameters, or only the rows or columns that a rank holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite.checkpoint.dtypes import to_torch
from megalite.config.dtypes import BY_CODE
from megalite.exchange.hf_folder import HFFolder, Stored
from megalite.model.layouts import from_hf
from megalite.model.names import is_transposed, names_there
from megalite.parallel.cuts import Shard


def fill(parameters: Mapping[str, Tensor], shards: Mapping[str, Shard], folder: HFFolder) -> None:
    """Fill a rank's parameters in place, reading only the part of each tensor that it holds."""
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(read_local(folder, name, shards[name]))


def placeholder(name: str, shape: tuple[int, ...]) -> Tensor:
    """A whole parameter of zeros that takes no memory, to be filled by `fill`."""
    return torch.zeros(()).expand(shape)


def read_whole(folder: HFFolder, name: str) -> Tensor:
    """The whole parameter `name` (megalite's name) in the dtype it is stored in."""
    return from_hf(lambda there: _read(folder.tensors[there]), name, folder.model)


def read_local(folder: HFFolder, name: str, shard: Shard) -> Tensor:
    """A rank's part, by `shard`, of the parameter `name`; only those rows or columns are read. Padding is 0."""
    model = folder.model
    there = [folder.tensors[other] for other in names_there(name, model)]
    transposed = is_transposed(name, model)
    dtype = stored_dtype(folder, name)
    local = torch.zeros(shard.local_shape, dtype=dtype)
    for piece in shard.pieces:
        rows = shard.local_rows(local, piece)
        if shard.dim == 1:
            # cut by columns: a single tensor there, with rows in the same order
            (stored,) = there
            columns = slice(piece.start, piece.start + piece.length)
            rows.copy_(_read(stored, columns).t() if transposed else _read(stored, slice(None), columns))
            continue
        done = 0
        for index, low, high in _runs(folder, name, range(piece.start, piece.start + piece.length)):
            part = slice(low, high)
            values = _read(there[index], slice(None), part).t() if transposed else _read(there[index], part)
            rows[done : done + high - low].copy_(values)
            done += high - low
    return local


def stored_dtype(folder: HFFolder, name: str) -> torch.dtype:
    """The smallest dtype that holds all tensors that form a parameter."""
    found = [to_torch(BY_CODE[folder.tensors[other].dtype]) for other in names_there(name, folder.model)]
    dtype = found[0]
    for other in found[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _runs(folder: HFFolder, name: str, rows: range) -> Iterator[tuple[int, int, int]]:
    """Yield where `rows` of a parameter are in the folder: (index of the tensor, first row, end), in order.

    Applies the mapping of values, `from_hf`, to row numbers instead of rows.
    """
    model, there = folder.model, names_there(name, folder.model)
    shapes = [folder.tensors[other].shape for other in there]
    transposed = is_transposed(name, model)
    counts = [shape[-1 if transposed else 0] for shape in shapes]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    numbers = {o: torch.arange(start, start + count) for o, start, count in zip(there, starts, counts, strict=True)}
    sources = from_hf(numbers.__getitem__, name, model)[rows.start : rows.stop].tolist()
    first = 0
    for i in range(1, len(sources) + 1):
        if i == len(sources) or sources[i] != sources[i - 1] + 1 or sources[i] in starts:
            index = max(j for j, start in enumerate(starts) if start <= sources[first])
            low = sources[first] - starts[index]
            yield index, low, low + i - first
            first = i


def _read(stored: Stored, *part: slice) -> Tensor:
    """Read a tensor, or part of it. The file is mapped for this read only, so that none of its pages stay in memory."""
    try:
        with safe_open(stored.file, framework="pt", device="cpu") as file:
            values: Tensor = file.get_slice(stored.key)[part or (slice(None),)]
            return values
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{stored.file}: tensor {stored.key} cannot be read ({error}); download it again") from None
