import sys
from pathlib import Path

import torch

# tests of every folder find assets.py
sys.path.insert(0, str(Path(__file__).parent))
# Tests share a machine, and sums over one thread are the same everywhere.
torch.set_num_threads(1)
