"""Conversations and token files that several tests of this folder share."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from megalite.data.indexed import IndexedWriter


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 conversations that can be told by their letters; one has weight 0.25, one is too long for a row."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = []
    for i in range(30):
        answer: dict[str, Any] = {"role": "assistant", "content": chr(97 + i % 26) * (1 + i % 7)}
        if i == 4:
            answer["weight"] = 0.25
        question = "?" * (40 if i == 9 else 1)
        rows.append({"messages": [{"role": "user", "content": question}, answer]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


# Documents [[5,6,7],[8]], [[9,10,2]], [] as Megatron-LM's own builder writes them.
GOLDEN_BIN = bytes.fromhex("0500 0600 0700 0800 0900 0a00 0200")
GOLDEN_IDX = b"".join(
    [
        bytes.fromhex("4d 4d 49 44 49 44 58 00 00"),
        struct.pack("<QBQQ", 1, 8, 3, 4),
        struct.pack("<3i", 3, 1, 3),
        struct.pack("<3q", 0, 6, 8),
        struct.pack("<4q", 0, 2, 3, 3),
    ]
)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    (tmp_path / "golden.bin").write_bytes(GOLDEN_BIN)
    (tmp_path / "golden.idx").write_bytes(GOLDEN_IDX)
    return tmp_path / "golden"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Documents [[5,6,7],[8]], [[9,10,2]], [] as uint16."""
    with IndexedWriter(tmp_path / "some", vocab_size=600) as writer:
        writer.add_document([5, 6, 7], [8])
        writer.add_document([9, 10, 2])
        writer.add_document()
    return tmp_path / "some"
