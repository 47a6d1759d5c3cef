"""Command-line parsing for the tools: a mistake prints one line, from one rank."""

from __future__ import annotations

import argparse
import time
from typing import Any, NoReturn

from megalite.launch.place import place


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps the line breaks of its description and refuses abbreviated flags."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        try:
            rank = place().rank
        except ValueError:
            rank = 0  # together.py reports a broken environment
        if rank > 0:
            time.sleep(1.0)  # torchrun ends all ranks at the first exit: let rank 0 print first
            self.exit(2)
        self.exit(2, f"error: {message}; see {self.prog} --help\n")
