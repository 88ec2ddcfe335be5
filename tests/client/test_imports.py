"""The library is light, and its public face is what is promised."""

from __future__ import annotations

import subprocess
import sys
import typing

import albireo
from albireo import SamplingParams, client
from albireo.client.requests import RequestKeywords, SamplingOverrides, Terms


def modules_after(code: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after `code`."""
    output = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(output.split())


def test_importing_the_library_brings_in_nothing_heavy() -> None:
    loaded = modules_after("from albireo import AlbireoError, Client, AsyncClient, SamplingParams")
    assert "albireo.client" in loaded
    assert not loaded & {"torch", "numpy", "zmq", "uvloop", "tokenizers", "transformers"}


def test_neither_does_importing_the_offline_class() -> None:
    loaded = modules_after("from albireo import LLM")
    assert "albireo.offline.llm" in loaded
    assert not loaded & {"torch", "numba", "numpy", "zmq", "rich", "uvloop", "tokenizers"}


def test_importing_the_package_brings_in_nothing_at_all() -> None:
    loaded = modules_after("import albireo; albireo.__version__")
    assert not loaded & {"albireo.client", "msgspec", "asyncio"}


def test_the_public_names() -> None:
    assert albireo.Client is client.Client and albireo.SamplingParams is SamplingParams
    assert {"LLM", "Client", "AsyncClient", "SamplingParams", "__version__"} <= set(dir(albireo))
    assert not hasattr(albireo, "Klient")
    assert all(hasattr(client, name) for name in client.__all__)


def test_keywords_are_the_sampling_parameters() -> None:
    sampling = set(SamplingParams.__struct_fields__)
    assert set(typing.get_type_hints(SamplingOverrides)) == sampling
    assert set(typing.get_type_hints(RequestKeywords)) == sampling | set(Terms.__struct_fields__)
