"""What lies in a run folder beside checkpoints and metrics: what the run was asked, and what its model is used with."""

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
from megalite.watch.disk import write_whole_text


def fill_run_folder(run_dir: Path, config: Config, template: str | None, step: int) -> None:
    """Write configuration, tokenizer and chat template; another configuration that is there is kept by `step`."""
    keep, text = run_dir / "config.yaml", to_yaml(config)
    before = keep.read_text(encoding="utf-8", errors="replace") if keep.exists() else ""
    if before.strip() and before != text:
        keep.rename(run_dir / f"config.before-step-{step:08d}.yaml")
    write_whole_text(keep, text)
    write_revision(run_dir, step)
    tokenizer = None if config.data.tokenizer is None else tokenizer_file(config.data.tokenizer)
    if tokenizer is not None and tokenizer.resolve().parent != run_dir.resolve():
        copy_files(tokenizer, run_dir, config.model.add_tokens)
    if template is not None:
        shutil.rmtree(run_dir / TEMPLATES, ignore_errors=True)  # this one is the run's
        write_whole_text(run_dir / "chat_template.jinja", template)


def remake_run_folder(run_dir: Path, config: Config, template: str | None, step: int) -> None:
    """Make a run folder again that was removed under its run; ConfigError where another run has it by now."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if launcher.held == run_dir / lock.NAME:
            lock.hold(run_dir)
        fill_run_folder(run_dir, config, template, step)
    except OSError as error:
        raise ConfigError(f"it cannot be made again: {error.strerror} ({error.filename or run_dir})") from None


def ask_requeue(run_dir: Path, step: int, reason: str) -> None:
    """Tell the job script, which sees exit status 0 of a stopped run as of a finished one, that there is more."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_whole_text(run_dir / "REQUEUE", f"step {step}\nreason {reason}\ntime {now}\n")
