"""The `albireo` command.  Commands are imported when they are used: `--help` stays quick."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
