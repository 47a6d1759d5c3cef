import sys
from pathlib import Path

# the tests here share the small checkpoints of checkpoints.py
sys.path.insert(0, str(Path(__file__).parent))
