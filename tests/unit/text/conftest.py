"""Tests of this folder import the helper modules in it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
