"""Conversations that several tests of this folder share."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 conversations whose words tell their number; one of weight 0.25 a message, one too long for a row."""
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
