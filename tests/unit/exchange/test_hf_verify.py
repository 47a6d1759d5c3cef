"""--verify finds a single weight that differs."""

from pathlib import Path

import torch
import transformers
from folders import Make

from megalite.exchange.convert import from_hf_folder
from megalite.exchange.hf_verify import verify


def test_a_changed_weight_is_found(folder_of: Make, tmp_path: Path) -> None:
    run = from_hf_folder(folder_of("Llama"), tmp_path / "run")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder_of("Llama"))
    with torch.no_grad():
        reference.model.layers[2].mlp.down_proj.weight[5, 7] += 0.1
    reference.save_pretrained(tmp_path / "other")
    found = verify(tmp_path / "other", run)
    assert not found.equal
    assert str(found).startswith("DIFFERENT: ")
    assert found.relative > 1e-5
