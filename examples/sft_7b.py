"""Instruction tuning: `torchrun --nproc_per_node 8 examples/sft_7b.py data.sft=FILE [--preset NAME] [key=value]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.run.entry import pretrain
from megalite.run.objective import TUNING
from megalite.run.together import leave

if __name__ == "__main__":
    corpus = Path(__file__).resolve().parent / "corpus"
    leave(pretrain(sys.argv[1:], default_preset="sft-7b", corpus=corpus, objective=TUNING))
