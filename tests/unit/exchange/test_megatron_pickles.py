"""What is opened of Megatron-LM's pickles: tensors and plain data. Enums have stand-ins; of nothing is code run."""

import enum
import os
import pickle
import random
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_megatron import MODEL, weights, whole_tensor, write

from megalite.exchange.megatron import from_megatron


class Kind(enum.Enum):
    A = 1


@pytest.mark.parametrize("trap", [Kind.A, Path("x"), print, eval, os.system])
def test_objects_are_not_opened(tmp_path: Path, trap: object) -> None:
    write(tmp_path / "iter_0000005", weights(MODEL), 1, 1, model_type=trap)
    with pytest.raises(ValueError, match=r"only tensors, plain containers, argparse.Namespace and Megatron") as error:
        from_megatron(tmp_path / "iter_0000005", tmp_path / "run", allow_pickle=True)
    assert getattr(trap, "__name__", type(trap).__name__) in str(error.value)


def enums() -> dict[str, Any]:
    """Enums that pickle as those of Megatron-LM, whose modules need not be there."""
    made = {}
    for module, name, members in (
        ("megatron.core.enums", "ModelType", {"encoder_or_decoder": 1}),
        ("megatron.core.transformer.enums", "AttnBackend", {"flash": 1, "auto": 5}),
        ("megatron.core.transformer.enums", "CudaGraphScope", {"full_iteration": 1}),
        ("megatron.core.rerun_state_machine", "RerunMode", {"validate_results": "validate_results"}),
    ):
        made[name] = enum.Enum(name, members, module=module)
    return made


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same, importable while a file is written."""
    found = enums()
    for name, kind in found.items():
        parts = kind.__module__.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, path, sys.modules.get(path) or types.ModuleType(path))
        setattr(sys.modules[kind.__module__], name, kind)
    return found


def test_a_checkpoint_as_megatron_saves_it(
    tmp_path: Path, there: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its enums, dtypes, random states, optimizer and counters; a module megatron that lies about is not run."""
    args = {"model_type": there["ModelType"].encoder_or_decoder, "attention_backend": there["AttnBackend"].auto,
            "cuda_graph_scope": [there["CudaGraphScope"].full_iteration], "params_dtype": torch.bfloat16, "rank": 0,
            "lr": 3e-4, "save": "/somewhere", "data_path": ["0.3", "a"], "bias_gelu_fusion": False,
            "moe_router_topk": 2, "use_legacy_models": True, "tokenizer_type": "Llama2Tokenizer", "hidden_dropout": 0.1,
            "apply_query_key_layer_scaling": False, "consumed_train_samples": 12, "wandb_project": ""}  # fmt: skip
    rest = {
        "checkpoint_version": 3.0,
        "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 7},
        "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1.0}]}},
        "rng_state": [{"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
                       "torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {"model": torch.zeros(4)}}],
        "rerun_state_machine": {"mode": there["RerunMode"].validate_results, "stats": {"a": {1, 2}}},
        "num_floating_point_operations_so_far": np.float64(2.0),
    }  # fmt: skip
    whole = weights(MODEL)
    write(tmp_path / "old" / "iter_0000005", whole, 2, 2, rest=rest, **args)
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text(f"open({str(tmp_path / 'run-as-code')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = from_megatron(tmp_path / "old" / "iter_0000005", tmp_path / "run", allow_pickle=True)
    assert "megatron" not in sys.modules
    assert not (tmp_path / "run-as-code").exists()
    assert torch.equal(whole_tensor(run, "layers.3.mlp.gate_up.weight"), whole["layers.3.mlp.gate_up.weight"])


def pickled(body: bytes, folder: Path) -> Path:
    """A file of torch's whose pickle is `body`, as an attacker would write it."""
    rank = folder / "iter_0000005" / "mp_rank_00"
    rank.mkdir(parents=True)
    with zipfile.ZipFile(rank / "model_optim_rng.pt", "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return folder / "iter_0000005"


class Call:
    def __init__(self, *reduce: Any) -> None:
        self.reduce = reduce

    def __reduce__(self) -> Any:
        return self.reduce


def test_an_enum_as_python_3_11_0_pickled_it(tmp_path: Path, there: dict[str, Any]) -> None:
    member = Call(getattr, (there["ModelType"], "encoder_or_decoder"))
    write(tmp_path / "iter_0000005", weights(MODEL), 1, 1, model_type=member)
    from_megatron(tmp_path / "iter_0000005", tmp_path / "run", allow_pickle=True)


ENUM = b"cmegatron.core.enums\nModelType\n"
TRAPS = {
    "a command": lambda mark: pickle.dumps(Call(os.system, (f"touch {mark}",)), 2),
    "code": lambda mark: pickle.dumps(Call(exec, (f"open({str(mark)!r}, 'w')",)), 2),
    "a constructor": lambda mark: pickle.dumps(Call(Path.touch, (mark,)), 2),
    "getattr of a module": lambda mark: pickle.dumps(Call(getattr, (Call(__import__, ("os",)), "system")), 2),
    "an enum that is called with another": lambda mark: b"\x80\x02" + ENUM + ENUM + b"\x85R.",
    "getattr of an enum": lambda mark: b"\x80\x02c__builtin__\ngetattr\n" + ENUM + b"X\x08\0\0\0__init__\x86R.",
    "getattr of a number": lambda mark: b"\x80\x02c__builtin__\ngetattr\nK\x01X\x08\0\0\0__init__\x86R.",
    "an enum that is built": lambda mark: b"\x80\x02" + ENUM + b"K\x01\x85R}X\x08\0\0\0__init__K\x01sb.",
    "a class that is built": lambda mark: b"\x80\x02" + ENUM + b"}X\x08\0\0\0__init__K\x01sb.",
    "a module of megatron's": lambda mark: b"\x80\x02cmegatron.os\nsystem\nX\x04\0\0\0true\x85R.",
    "nothing": lambda mark: b"",
    "half": lambda mark: b"\x80\x02}X\x04\0",
    "deep": lambda mark: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a list": lambda mark: b"\x80\x02].",
    "args alone": lambda mark: b"\x80\x02}X\x04\0\0\0argscargparse\nNamespace\n)\x81}bs.",
    "args of numbers": lambda mark: b"\x80\x02}X\x04\0\0\0argscargparse\nNamespace\n)\x81}K\x01K\x02sbs.",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_malicious_pickle_is_a_message(tmp_path: Path, trap: str) -> None:
    mark = tmp_path / "run-as-code"
    with pytest.raises(ValueError, match=r"model_optim_rng\.pt: ") as error:
        from_megatron(pickled(TRAPS[trap](mark), tmp_path), tmp_path / "run", allow_pickle=True)
    assert "\n" not in str(error.value)
    assert not mark.exists()
    assert not (tmp_path / "run").exists()
