"""Build megalite's compiled parts; all metadata is in pyproject.toml.

    pip install --no-build-isolation --no-deps -e .

builds `megalite._C` (torch ops) and `megalite._index` (index reader, without torch). Environment:

MEGALITE_NO_EXT=1   build neither: a pure Python install, slower but complete
MEGALITE_CUDA=0|1   never build the CUDA kernels, or fail without them; by default they are built if nvcc and a CUDA
                    build of torch are present
MAX_JOBS=n          compile n files at a time
"""

import os
import shutil
from glob import glob

from setuptools import setup


def wants_cuda(torch, cuda_home: str | None) -> bool:
    """Whether to compile the .cu files. Raises SystemExit if MEGALITE_CUDA=1 and they cannot be compiled."""
    wish = os.environ.get("MEGALITE_CUDA")
    missing = []
    if torch.version.cuda is None:
        missing.append("a CUDA build of torch")
    if cuda_home is None and shutil.which("nvcc") is None:
        missing.append("nvcc")
    if wish == "1" and missing:
        raise SystemExit(f"MEGALITE_CUDA=1 needs {' and '.join(missing)}; install it or unset MEGALITE_CUDA")
    return wish != "0" and not missing


def extensions() -> dict:
    """Arguments of setup() for the compiled parts."""
    if os.environ.get("MEGALITE_NO_EXT") == "1":
        return {}
    try:
        import torch
        from pybind11.setup_helpers import Pybind11Extension
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"building megalite needs {error.name}: install it first (and use --no-build-isolation), "
            "or set MEGALITE_NO_EXT=1 for a pure Python install"
        ) from None

    folders = ["softmax", "rope"]
    sources = ["csrc/ops.cpp"] + [f"csrc/{op}/{op}{part}.cpp" for op in folders for part in ("", "_cpu")]
    # Compiled with OpenMP but not linked to it: the symbols come from the runtime that torch has loaded, so that
    # torch.set_num_threads applies to these loops too.
    flags = {"cxx": ["-O3", "-fopenmp", "-g0", "-fvisibility=hidden"]}
    extension = cpp_extension.CppExtension
    if wants_cuda(torch, cpp_extension.CUDA_HOME):
        extension = cpp_extension.CUDAExtension
        sources += [f"csrc/{op}/{op}_cuda.cu" for op in folders]
        flags = {"cxx": [*flags["cxx"], "-DMEGALITE_WITH_CUDA"], "nvcc": ["-O3"]}
    headers = glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)
    # _C uses Python only to be importable, so one build works with every Python version.
    ops = extension("megalite._C", sources, extra_compile_args=flags, py_limited_api=True, depends=headers)
    # Fused multiply-add would break ties in the blending arithmetic differently on different machines.
    index = Pybind11Extension(
        "megalite._index",
        ["csrc/index/index.cpp"],
        cxx_std=17,
        extra_compile_args=["-O3", "-ffp-contract=off"],
        depends=headers,
    )
    return {"ext_modules": [ops, index], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**extensions())
