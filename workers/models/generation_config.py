"""A Hugging Face directory's generation_config.json: what ends answers, and how to sample them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from albireo.ipc.params import ParameterError, SamplingDefaults, SamplingParams

from .config import ModelError
from .hf_settings import read_json


def read_generation_config(directory: Path) -> dict[str, Any]:
    """{} where there is none.  Raises ModelError for a file that is no JSON object."""
    path = _path(directory)
    return read_json(path) if path.is_file() else {}


def read_sampling_defaults(directory: Path) -> SamplingDefaults:
    """Those of its settings that are set.  Raises ModelError for one that no request could have.

    As in vLLM and SGLang whether it says `do_sample` makes no difference, for a request that wants
    the best token asks for a temperature of 0.
    """
    found = read_generation_config(directory)
    if found.get("top_k") == -1:
        found["top_k"] = 0
    try:
        defaults = msgspec.convert(found, SamplingDefaults)
        SamplingParams(**defaults.fields()).validate()
    except (msgspec.ValidationError, ParameterError) as error:
        raise ModelError(
            f"{_path(directory)}: {error}; mend it, or leave it out with --sampling-defaults openai"
        ) from None
    return defaults


def _path(directory: Path) -> Path:
    return directory / "generation_config.json"
