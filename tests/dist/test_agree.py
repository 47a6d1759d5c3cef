"""Nodes with disks of their own: what one of them has otherwise is told by it before the first step."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assets import asset
from ranks import COMMON, REPOSITORY, Ended, Ranks, pretrain, pretrain_at, run_ranks
from test_generate import tool

from megalite.checkpoint.folder import complete
from megalite.data.corpus import train_tokenizer
from megalite.data.indexed import IndexedWriter

SHARED = "train.run_dir must be on a file system that all nodes share"


@pytest.fixture
def nodes(tmp_path: Path) -> list[Path]:
    """Working directories of two nodes, with the same data under the same relative name."""
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        folder.mkdir()
        write(folder / "text", range(256))
    return folders


def write(prefix: Path, tokens: range) -> None:
    with IndexedWriter(prefix, vocab_size=257) as writer:
        for _ in range(60):
            writer.add_document(tokens)


def pretrain_with_torch(versions: list[str], argv: list[str]) -> int:
    torch.__version__ = versions[int(os.environ["RANK"])]
    return pretrain(argv)


def told(ended: Ended, rank: int = 1) -> str:
    """What the rank says in its one line, after its name; rank 0, whose node has another log, says the same."""
    assert set(ended.codes) <= {1, 2}, ended
    (line,) = ended.err[rank].splitlines()
    where = f"error: rank {rank} on {socket.gethostname()}: "
    assert line.startswith(where), ended
    assert ended.err[0].splitlines() in ([], [line]), ended
    assert not re.search(r"^step +\d", "".join(ended.out), re.MULTILINE), ended
    return line.removeprefix(where)


def two_nodes(nodes: list[Path], argv: list[str], ranks: int = 2) -> Ended:
    with Ranks(ranks, pretrain_at, nodes, argv, nodes=2) as running:
        return running.wait()


@pytest.mark.parametrize("layout", ["dp=2", "tp=2", "pp=2"])
def test_two_agents_with_run_folders_that_are_not_shared(settings, nodes: list[Path], layout: str) -> None:
    argv = settings(Path("run"), "parallel.tp=null", "parallel.pp=null", f"parallel.{layout}", "parallel.zero=1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"),
        *(REPOSITORY / "examples" / "pretrain_7b.py", "--preset", "tiny", *argv),
    ]
    agents = []
    for folder in nodes:
        environment = {**os.environ, **COMMON, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TMPDIR": str(folder)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        agents.append(subprocess.Popen([*map(str, torchrun)], cwd=folder, env=environment, **pipes))
    try:
        said = [agent.communicate(timeout=100) for agent in agents]
    finally:
        for agent in agents:
            try:
                os.killpg(agent.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            agent.wait()
    assert all(agent.returncode != 0 for agent in agents)
    # which agent's rank is rank 0 is for torchrun to choose; both logs have the line
    for out, err in said:
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, (out, err)
        assert lines[0].startswith(f"error: rank 1 on {socket.gethostname()}: train.run_dir=run is {nodes[0].parent}")
        assert lines[0].endswith(SHARED)
        assert not re.search(r"^step +\d", out, re.MULTILINE), out
    # nothing is left that the next start would take for somebody's
    assert [os.listdir(folder / "run") for folder in nodes if (folder / "run").exists()] == [[]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_folder_that_is_not_shared(settings, nodes: list[Path], ranks: int) -> None:
    text = told(two_nodes(nodes, settings(Path("run")), ranks), rank=ranks // 2)
    assert text == f"train.run_dir=run is {nodes[1] / 'run'} here and does not show a file that rank 0 wrote; {SHARED}"
    assert os.listdir(nodes[0] / "run") == []
    assert not (nodes[1] / "run").exists()


def test_a_run_folder_that_one_node_cannot_write(settings, nodes: list[Path]) -> None:
    (nodes[1] / "run").symlink_to("/proc/self")
    text = told(two_nodes(nodes, settings(Path("run"))))
    assert text.startswith("train.run_dir=run ")


def test_another_torch(settings, tmp_path: Path) -> None:
    with Ranks(2, pretrain_with_torch, ["2.9.0", "2.9.1"], settings(tmp_path / "run"), nodes=2) as ranks:
        text = told(ranks.wait())
    assert text.startswith("torch is 2.9.1 here and is 2.9.0 on rank 0")


def test_a_shared_run_folder_by_two_nodes(settings, nodes: list[Path], tmp_path: Path) -> None:
    ended = two_nodes(nodes, settings(tmp_path / "run", "data.path=text", "train.steps=2"), 4)
    assert ended.codes == [0] * 4, ended
    assert len(complete(tmp_path / "run")) == 1
    assert not list((tmp_path / "run").glob(".writable*"))


def test_a_checkpoint_that_one_node_does_not_see(settings, nodes: list[Path]) -> None:
    argv = settings(Path("run"), "data.path=text", "train.steps=1")
    with Ranks(1, pretrain_at, nodes, argv) as alone:
        assert alone.wait().codes == [0]
    argv[-1:] = [argv[-1], "train.steps=2"]
    text = told(two_nodes(nodes, argv))
    assert text.startswith("train.run_dir=run has no checkpoint here and has step-00000001 (")
    assert text.endswith(f"on rank 0 ({socket.gethostname()}); {SHARED}")
    # nor where there is nothing left to do for the one that sees it
    text = told(two_nodes(nodes, [*argv, "train.steps=1"]))
    assert text.startswith("train.run_dir=run has no checkpoint here and has step-00000001 (")


def test_other_data_under_the_same_name(settings, nodes: list[Path], tmp_path: Path) -> None:
    argv = settings(tmp_path / "run", "data.path=text", "data.valid_fraction=0")
    write(nodes[1] / "text", range(1, 257))  # of the same size
    text = told(two_nodes(nodes, argv))
    assert text.startswith("data.path=text holds 31,")
    assert text.endswith("give every node the same files, preferably on a shared file system")
    write(nodes[1] / "text", range(100))
    assert told(two_nodes(nodes, argv)).startswith("data.path=text holds 13,")
    # held-out data too
    write(nodes[1] / "text", range(256))
    for node, tokens in zip(nodes, (range(90), range(1, 91))):
        write(node / "other", tokens)
    assert told(two_nodes(nodes, [*argv, "data.valid={a: other}"])).startswith("data.valid.a=other holds ")


def test_another_tokenizer_under_the_same_name(settings, nodes: list[Path], tmp_path: Path) -> None:
    argv = settings(tmp_path / "run", "data.path=text", "data.tokenizer=my/tokenizer.json")
    for number, node in enumerate(nodes):
        (node / "my").mkdir()
        model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
        (node / "my" / "tokenizer.json").write_text(json.dumps({"model": model}))
        (node / "my" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "ab"[number]}))
    assert told(two_nodes(nodes, argv)).startswith("data.tokenizer=my/tokenizer.json holds ")


def test_another_start_under_the_same_name(settings, nodes: list[Path], tmp_path: Path) -> None:
    argv = settings(tmp_path / "run", "data.path=text")
    for seed, node in enumerate(nodes):
        first = settings(node / "first", "train.steps=1", f"train.seed={seed}")
        run_ranks(1, pretrain, first)
    assert told(two_nodes(nodes, [*argv, "checkpoint.load=first"])).startswith(
        "checkpoint.load=first holds step-00000001"
    )


def test_a_file_that_one_node_lacks(settings, nodes: list[Path], tmp_path: Path) -> None:
    argv = settings(tmp_path / "run", "data.path=text")
    (nodes[1] / "text.idx").unlink()
    text = told(two_nodes(nodes, argv))
    assert text.startswith("data.path=text: text.idx: no such file")
    # a mistake that all make alike is told once, by rank 0
    (nodes[0] / "text.idx").unlink()
    ended = two_nodes(nodes, argv)
    assert ended.err[1] == ""
    assert ended.err[0].startswith("error: data.path=text: text.idx: no such file")
    assert ended.err[0].count("\n") == 1


def test_a_command_that_differs(settings, nodes: list[Path], tmp_path: Path) -> None:
    for node, rate in zip(nodes, ("1e-3", "2e-3")):
        (node / "my.yaml").write_text(f"optim: {{lr: {rate}}}\n")
    argv = [word for word in settings(tmp_path / "run", "--config", "my.yaml") if not word.startswith("optim.lr=")]
    text = told(two_nodes(nodes, argv))
    assert text.startswith("optim.lr is 0.002 here and is 0.001 on rank 0")


def test_a_folder_that_rank_0_may_not_write(settings, nodes: list[Path]) -> None:
    (nodes[0] / "run").symlink_to("/proc/self")
    ended = two_nodes(nodes, settings(Path("run"), "data.path=text"))
    assert set(ended.codes) <= {1, 2}
    assert "run" in ended.err[0]
    assert ended.err[0].count("\n") == 1
    assert ended.err[1].count("\n") <= 1


def test_a_hugging_face_folder_that_differs(settings, nodes: list[Path], tmp_path: Path) -> None:
    for node in nodes:
        shutil.copytree(asset("smollm2"), node / "hf")
    config = json.loads((nodes[1] / "hf" / "config.json").read_text())
    (nodes[1] / "hf" / "config.json").write_text(json.dumps({**config, "note": 1}))
    argv = settings(tmp_path / "run", "data.path=text", "model.from_hf=hf", "parallel.dp=2")
    argv = [word for word in argv if not word.startswith("model.") or "from_hf" in word]
    assert told(two_nodes(nodes, argv)).startswith("model.from_hf=hf holds ")


def generate_at(folders: list[Path], argv: list[str]) -> int:
    os.chdir(folders[int(os.environ["RANK"])])
    return tool("generate.py", argv)


def test_a_model_that_differs_for_a_tool(settings, nodes: list[Path]) -> None:
    with (REPOSITORY / "examples" / "corpus" / "kjv.jsonl").open() as rows:
        tokenizer = train_tokenizer([json.loads(row)["text"] for row in rows][::20], 400)
    for seed, node in enumerate(nodes):
        run_ranks(1, pretrain, settings(node / "run", "model.vocab_size=400", "train.steps=1", f"train.seed={seed}"))
        (node / "run" / "tokenizer.model").write_bytes(tokenizer)
    argv = ["run", "--prompt", "a", "--tp", "2", "--device", "cpu"]
    with Ranks(2, generate_at, nodes, argv, nodes=2) as running:
        ended = running.wait()
    assert told(ended).startswith("model=run holds step-00000001 (")
