import sys
from pathlib import Path

# the parity tests share the batches and tolerances of test_parity.py
sys.path.insert(0, str(Path(__file__).parent))
