"""The CUDA kernels compile, with or without a GPU, wherever nvcc is on PATH."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH: the .cu files stay uncompiled here")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*/*.cu")), ids=lambda path: path.name)
def test_compiles(source, tmp_path):
    targets = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in (80, 90)]
    command = ["nvcc", "-c", "-std=c++17", *targets, "-Werror=all-warnings", str(source), "-o", str(tmp_path / "out.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.o").stat().st_size > 0
