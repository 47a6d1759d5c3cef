"""How many random variations a campaign tries: a seeded few in `make test`, all of them in `make soak`."""

import os

SOAK = os.environ.get("SOAK") == "1"


def rounds(few: int, all_of_them: int) -> int:
    """The number of variations to try. A seed numbers each, so `make soak` begins with those of `make test`."""
    return all_of_them if SOAK else few
