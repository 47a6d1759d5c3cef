"""The command line of the tools: a mistake in it is one line, told once and not once a rank."""

from __future__ import annotations

import argparse
import time
from typing import Any, NoReturn

from megalite.launch.place import place


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints its description and epilog as they stand, and takes no shortened flags."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        try:
            rank = place().rank
        except ValueError:
            rank = 0  # which is told by whoever asks for it
        if rank > 0:
            time.sleep(1.0)  # so that the launcher lets the first rank speak
            self.exit(2)
        self.exit(2, f"error: {message}; see {self.prog} --help\n")
