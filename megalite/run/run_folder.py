"""The folder of a run: whether it can be written, and its configuration, tokenizer, chat template and REQUEUE."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from megalite.checkpoint import lock
from megalite.config import Config, ConfigError, to_yaml
from megalite.launch import launcher
from megalite.run.revision import write_revision
from megalite.text.tokenizer import tokenizer_file
from megalite.text.tokenizer_files import TEMPLATES, copy_files
from megalite.watch import disk
from megalite.watch.disk import write_whole_text

# prefix of the short-lived files with which rank 0 tests that the folder can be written and that all ranks share it
PROBE = ".writable"


def holds_files(run_dir: Path) -> bool:
    """Whether a folder holds anything but what rank 0 may just have put there while another rank looks."""
    return any(
        path.name != lock.NAME and not path.name.startswith((PROBE, lock.TEMPORARY)) for path in run_dir.iterdir()
    )


def make_run_folder(run_dir: Path) -> None:
    """Make the folder before the ranks spend seconds on starting. Raises ConfigError if it cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / PROBE
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"train.run_dir={run_dir} cannot be written ({error.strerror}). {disk.remedy(error)}"
        ) from None


def fill_run_folder(run_dir: Path, config: Config, template: str | None, step: int) -> None:
    """Write configuration, tokenizer and chat template; keep another config.yaml as config.before-step-*.yaml."""
    path, text = run_dir / "config.yaml", to_yaml(config)
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if before.strip() and before != text:
        path.rename(run_dir / f"config.before-step-{step:08d}.yaml")
    write_whole_text(path, text)
    write_revision(run_dir, step)
    tokenizer = None if config.data.tokenizer is None else tokenizer_file(config.data.tokenizer)
    if tokenizer is not None and tokenizer.resolve().parent != run_dir.resolve():
        copy_files(tokenizer, run_dir, config.model.add_tokens)
    if template is not None:
        shutil.rmtree(run_dir / TEMPLATES, ignore_errors=True)  # those came with another template
        write_whole_text(run_dir / "chat_template.jinja", template)


def remake_run_folder(run_dir: Path, config: Config, template: str | None, step: int) -> None:
    """Make a run folder again that was deleted during its run. Raises ConfigError if another run has taken the path."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if launcher.held == run_dir / lock.NAME:
            lock.hold(run_dir)
        fill_run_folder(run_dir, config, template, step)
    except OSError as error:
        raise ConfigError(f"it cannot be made again: {error.strerror} ({error.filename or run_dir})") from None


def ask_requeue(run_dir: Path, step: int, reason: str) -> None:
    """Write REQUEUE for the job script: a stopped run exits with status 0, as a finished one does."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_whole_text(run_dir / "REQUEUE", f"step {step}\nreason {reason}\ntime {now}\n")
