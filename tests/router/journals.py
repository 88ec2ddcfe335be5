"""Journals for tests, with records for them, and what a router would find there."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from albireo.ipc.messages import Submit
from albireo.router.journal import Journal
from albireo.router.records import Accepted, Opened
from albireo.router.replay import replay
from albireo.router.segments import mapped, segments_in

OPENED = Opened("1", "model", 10, 1000, 128)
SIZE = 64 * 1024 * 3
Tokens = dict[int, list[int]]


def submit(prompt: list[int], max_tokens: int = 50) -> Submit:
    return Submit(
        request=0, prompt_ids=prompt, max_tokens=max_tokens, min_tokens=0, temperature=1.0,
        top_k=0, top_p=1.0, min_p=0.0, seed=-(2**63), stop=("é",), stop_token_ids=(2,),
        include_stop=False, skip_special_tokens=True, logit_bias={3: 1.5},
    )  # fmt: skip


def record(client_id: int, n: int = 1, prompt: int = 3, max_tokens: int = 50) -> Accepted:
    return Accepted(
        0, b"owner", client_id, "t", submit(list(range(prompt)), max_tokens),
        {choice: [] for choice in range(n)},
    )  # fmt: skip


def heavy(client_id: int, max_tokens: int = 50) -> Accepted:
    """With a short prompt, and as much of everything else as a request may have."""
    params = msgspec.structs.replace(
        submit([100_000] * 3, max_tokens),
        stop=("\U0001f600" * 256,) * 16,
        allowed_token_ids=tuple(range(100_000, 104_096)),
        logit_bias=dict.fromkeys(range(100_000, 101_024), 1.5),
        bad_words=(tuple(range(100_000, 100_016)),) * 64,
    )
    return Accepted(0, b"owner", client_id, "\U0001f600" * 64, params, {0: [], 1: []})


def open_journal(
    path: Path, size: int = SIZE, sync_s: float = 0.0, restarted: bool = False
) -> Journal:
    return Journal(path, size, sync_s, OPENED, restarted)


def found(path: Path) -> dict[int, Tokens]:
    """Tokens by client's id, as a router would find them now."""
    while True:
        # The journal's thread may delete a file meanwhile; a dead router's does not.
        with contextlib.suppress(FileNotFoundError):
            in_flight, ended = found_in(segments_in(path))
            return in_flight | ended


def found_in(files: list[Path]) -> tuple[dict[int, Tokens], dict[int, Tokens]]:
    """The same of these files, of those in flight and of those that have ended."""
    in_flight, ended = (
        {each.client_id: each.tokens for each in requests}
        for requests in replay([mapped(each) for each in files], OPENED)
    )
    return in_flight, ended


def size_of(path: Path) -> int:
    """Bytes of all files there; the journal's thread may delete one meanwhile."""
    size = 0
    for each in segments_in(path):
        with contextlib.suppress(FileNotFoundError):
            size += each.stat().st_size
    return size
