"""Command lines and configuration files, parsed as by a script."""

from pathlib import Path

from megalite.config import Config, Request, parse_command_line


def parse(*argv: str, default_preset: str | None = None) -> Request:
    return parse_command_line(argv, default_preset=default_preset, prog="train.py")


def from_yaml(text: str, tmp_path: Path) -> Config:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return parse("--config", str(file)).config
