"""The files that options name: their text, and where what is made can go."""

from __future__ import annotations

from pathlib import Path

import click


def text_of(path: str, option: str) -> str:
    """Raises BadParameter for a file that cannot be read, or is no UTF-8."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} cannot be read: {error}", param_hint=option) from None


def require_directory(output: Path) -> None:
    """Before what takes its time to make.  Raises ClickException where it could not be written."""
    if not output.parent.is_dir():
        raise click.ClickException(f"-o {output}: there is no directory {output.parent}")
