"""Regenerate kjv.jsonl and poems.jsonl from the Debian packages bible-kjv, bible-kjv-text and fortunes-zh.

apt-get install bible-kjv bible-kjv-text fortunes-zh
python examples/corpus/make_corpus.py
"""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
FORTUNES = Path("/usr/share/games/fortunes")
CHAPTERS = 1189
POEMS = {"tang300": 313, "song100": 96}


def bible_chapters() -> Iterator[dict[str, str]]:
    """Yield one row per chapter, with one verse per line and without verse numbers."""
    printed = subprocess.run(
        ["bible", "-l100000", "gen1:1-rev22:21"], check=True, capture_output=True, text=True
    ).stdout
    chapter, verses = "", list[str]()
    for line in filter(None, printed.split("\n")):
        verse = re.fullmatch(r" +\d+ (.*)", line)
        if verse:
            verses.append(verse[1])
            continue
        if verses:
            yield {"id": chapter, "text": "\n".join(verses)}
        chapter, verses = line, []
    yield {"id": chapter, "text": "\n".join(verses)}


def poems(name: str) -> Iterator[dict[str, str]]:
    """Yield one row per poem, without prose prefaces, notes on the author and part numbers."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", (FORTUNES / name).read_text(encoding="utf-8"))
    entries = [entry.strip() for entry in re.split(r"^%.*\n?", plain, flags=re.MULTILINE)]
    for number, entry in enumerate(filter(None, entries), start=1):
        title, author, *lines = entry.split("\n")
        body = "\n".join("" if re.fullmatch(r"\s*(其[一二三四])?\s*", line) else line for line in lines)
        stanzas = re.split(r"\n{2,}", body.strip("\n"))
        if "并序" in title:
            stanzas = stanzas[1:]
        yield {
            "id": f"{name} {number}",
            "title": re.sub(r"^题目[:：]", "", title).replace("・并序", ""),
            "author": re.sub(r"^作者[:：]|（.*", "", author),
            "text": "\n".join(stanzas),
        }


def write(path: Path, rows: list[dict[str, str]], expected: int) -> None:
    if len(rows) != expected:
        raise SystemExit(f"{path.name}: found {len(rows)} documents, expected {expected}")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} documents, {path.stat().st_size} bytes")


if __name__ == "__main__":
    write(HERE / "kjv.jsonl", list(bible_chapters()), CHAPTERS)
    write(HERE / "poems.jsonl", [row for name in POEMS for row in poems(name)], sum(POEMS.values()))
