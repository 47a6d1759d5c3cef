"""Every family in and out: the same logits and greedy tokens as transformers, the same bits back at tp 2 x pp 2."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from assets import asset
from folders import FAMILIES, VOCAB, Make
from safetensors.torch import load_file
from torch.nn import functional as F

from megalite.checkpoint.folder import complete, find, read_manifest
from megalite.checkpoint.save import save
from megalite.checkpoint.state import State, state_from
from megalite.config import Config, ParallelConfig, TrainConfig, check, resolve
from megalite.config.parameters import global_name
from megalite.engine.engine import build
from megalite.exchange.convert import from_hf_folder, to_hf_folder
from megalite.exchange.hf_export import INDEX
from megalite.exchange.hf_folder import open_config, open_folder
from megalite.exchange.hf_verify import load_decoder, verify
from megalite.exchange.hf_weights import fill, placeholder
from megalite.model.context import Context
from megalite.model.cut_table import cut_model
from megalite.model.decoder import Decoder
from megalite.model.init import materialise
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.mesh import Mesh
from megalite.parallel.threads import run_threads
from megalite.plan.costs import stage_layers

FRESH_MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(family: str, folder_of: Make, tmp_path: Path) -> None:
    source = folder_of(family)
    run = from_hf_folder(source, tmp_path / "run")
    found = verify(source, run)
    assert found.logit > 0.5
    assert found.equal, str(found)
    reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    theirs = reference.generate(tokens, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    decoder = load_decoder(run)
    with torch.inference_mode():
        for _ in range(64):
            logits = decoder(tokens, Context(torch.arange(tokens.shape[1])[None]))
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert tokens.tolist() == theirs.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_come_back_from_tp_2_pp_2(family: str, folder_of: Make, tmp_path: Path) -> None:
    source, run_dir = folder_of(family), tmp_path / "run"
    from_hf_folder(source, run_dir)
    model = dataclasses.replace(open_config(source)[0], from_hf=str(source))
    parallel = ParallelConfig(tp=2, pp=2, zero=1, dp=1)
    train = TrainConfig(run_dir=str(run_dir), seq_len=16, micro_batch_size=1, global_batch_size=2)
    config = resolve(Config(model=model, parallel=parallel, train=train), 4)
    check(config, 4)

    def main(world: World) -> None:
        engine = build(config, world)
        fill(engine.parameters, engine.shards, open_folder(source))
        engine.optimizer.adopt()
        values = dataclasses.asdict(State(step=7, consumed_samples=7))
        save(run_dir, config, engine.mesh, engine.shards, engine.spans(), engine.state(), values)

    run_threads(4, main)
    assert find(run_dir).name == "step-00000007"
    back = to_hf_folder(run_dir, tmp_path / "back", shard_bytes=60_000)
    assert len(json.loads((back / INDEX).read_text())["weight_map"]) == len(tensors_of(source))
    assert len(list(back.glob("model-*.safetensors"))) > 2
    assert same_bits(tensors_of(back), tensors_of(source))
    for file in sorted(FRESH_MODEL - {"model.safetensors"} | {"chat_template.jinja"}):
        old, new = (json.loads(f.read_text()) if file.endswith("json") else f.read_text()
                    for f in (source / file, back / file))  # fmt: skip
        assert old == new, file

    reference, opened = (transformers.AutoModelForCausalLM.from_pretrained(f).eval() for f in (source, back))
    tokens = torch.arange(0, 60, 2)[None]
    assert torch.equal(reference(tokens).logits, opened(tokens).logits)
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(f) for f in (source, back))
    chat = [{"role": "user", "content": "Ærlig 海"}]
    assert theirs.apply_chat_template(chat)["input_ids"] == ours.apply_chat_template(chat)["input_ids"]


def test_a_dtype_is_chosen_or_kept(folder_of: Make, tmp_path: Path) -> None:
    source = folder_of("Qwen2")
    halved = from_hf_folder(source, tmp_path / "bf16", "bf16")
    out = to_hf_folder(halved, tmp_path / "out")
    expected = {key: value.bfloat16() for key, value in tensors_of(source).items()}
    assert same_bits(tensors_of(out), expected)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    # and a model of mixed dtypes comes back as it was
    assert same_bits(tensors_of(to_hf_folder(from_hf_folder(out, tmp_path / "r"), tmp_path / "o")), expected)
    wide = to_hf_folder(halved, tmp_path / "wide", "fp32")
    assert same_bits(tensors_of(wide), {key: value.float() for key, value in expected.items()})


def test_what_fp16_cannot_hold_is_refused(folder_of: Make, tmp_path: Path) -> None:
    run = from_hf_folder(folder_of("Llama"), tmp_path / "run")
    weights = read_manifest(find(run))["tensors"]
    assert all(entry["dtype"] == "float32" for entry in weights.values())
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder_of("Llama"))
    with torch.no_grad():
        reference.lm_head.weight[3, 3] = 7e4
    reference.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"loss_head.head.weight has values beyond 65504.*bf16 or fp32"):
        from_hf_folder(tmp_path / "large", tmp_path / "half", "fp16")
    assert not list(tmp_path.glob("*half*"))


def test_nothing_is_overwritten_and_nothing_left_behind(folder_of: Make, tmp_path: Path) -> None:
    source, target = folder_of("Qwen3"), tmp_path / "target"
    target.mkdir()
    from_hf_folder(source, target)  # an empty folder is as good as none
    before = sorted(target.rglob("*"))
    for again in (lambda: from_hf_folder(source, target), lambda: to_hf_folder(target, target)):
        with pytest.raises(ValueError, match="is not empty; nothing is overwritten"):
            again()
    assert sorted(target.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert state_from(read_manifest(complete(target)[0])) == State()


def test_an_export_is_of_the_checkpoints_model_not_of_config_yaml(folder_of: Make, tmp_path: Path) -> None:
    run = from_hf_folder(folder_of("Llama"), tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("ffn_hidden_size: 56", "ffn_hidden_size: 60"))
    assert open_config(to_hf_folder(run, tmp_path / "out"))[0].ffn_hidden_size == 56
    assert verify(tmp_path / "out", run).equal


def test_smollm2_has_the_perplexity_that_transformers_finds() -> None:
    source = asset("smollm2")
    corpus = Path(__file__).parents[3] / "examples" / "corpus" / "kjv.jsonl"
    with corpus.open(encoding="utf-8") as rows:
        text = json.loads(next(rows))["text"]
    tokens = torch.tensor([transformers.AutoTokenizer.from_pretrained(source)(text)["input_ids"][:256]])
    reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = reference(tokens[:, :-1], use_cache=False).logits
    expected = F.cross_entropy(logits[0], tokens[0, 1:]).exp().item()
    del reference, logits
    length = tokens.shape[1] - 1
    positions, mask = torch.arange(length)[None], torch.ones(1, length)
    folder = open_folder(source)
    for tp, pp in ((1, 1), (3, 1), (1, 2)):
        parallel = ParallelConfig(tp=tp, pp=pp, dp=1)
        train = TrainConfig(seq_len=length, micro_batch_size=1, global_batch_size=1)
        config = resolve(Config(model=folder.model, parallel=parallel, train=train), tp * pp)
        check(config, tp * pp)

        def main(world: World, config: Config = config, tp: int = tp, pp: int = pp) -> float:
            mesh = Mesh(world, tp=tp, pp=pp, dp=1, cp=1, kv_replicas=1)
            first, last = mesh.is_first_stage, mesh.is_last_stage
            with torch.device("meta"):
                stage = Decoder(config.model, stage_layers(config)[mesh.pp.rank], first=first, last=last)
            cut_model(stage, config.model, mesh.tp, config.parallel.sp)
            shards = materialise(stage, config.model, mesh.tp, placeholder, dtype=torch.float32, device=mesh.device)
            x = tokens[:, :-1] if first else torch.empty(1, length, config.model.hidden_size)
            with torch.inference_mode():
                shards = {global_name(name, tied=True): shard for name, shard in shards.items()}
                fill({global_name(n, tied=True): p for n, p in stage.named_parameters()}, shards, folder)
                if not first:
                    world.receive(x, 0).wait()
                out = stage(x, Context(positions), tokens[:, 1:] if last else None, mask if last else None)
                if not last:
                    world.send(out, 1)
            return out["loss"].item() if last and mesh.tp.rank == 0 else 0.0

        losses = [main(SoloWorld())] if tp * pp == 1 else run_threads(tp * pp, main)
        found = math.exp(sum(losses) / length)
        print(f"tp {tp} pp {pp}: perplexity {found:.6f}, transformers {expected:.6f}")
        assert found == pytest.approx(expected, rel=5e-5)
