"""Where a plan's words are, for the kernels that read it on the device: see ipc/plan.py.

HEADER, then the sections, rows of so many words each; AT_N_TAKE and so on: the words of
the header that have the numbers of their rows.
"""

from __future__ import annotations

import triton.language as tl

from ....ipc.plan import (
    APPEND_WORDS,
    CHUNK_WORDS,
    EDIT_WORDS,
    GRAMMAR_WORDS,
    HISTORY_WORDS,
    PLAN_HEADER,
    SCORE_WORDS,
    SECTIONS,
    TAKE_WORDS,
)

HEADER = tl.constexpr(PLAN_HEADER)
TAKE = tl.constexpr(TAKE_WORDS)
APPEND = tl.constexpr(APPEND_WORDS)
CHUNK = tl.constexpr(CHUNK_WORDS)
EDIT = tl.constexpr(EDIT_WORDS)
HISTORY = tl.constexpr(HISTORY_WORDS)
GRAMMAR = tl.constexpr(GRAMMAR_WORDS)
SCORE = tl.constexpr(SCORE_WORDS)

_AT = {name: tl.constexpr(4 + index) for index, (name, _) in enumerate(SECTIONS)}
AT_N_TAKE, AT_N_APPEND, AT_N_CHUNK = _AT["take"], _AT["append"], _AT["chunk"]
AT_N_TOKEN, AT_N_DECODE, AT_N_EDIT = _AT["chunk_token"], _AT["decode"], _AT["edit"]
AT_N_HISTORY, AT_N_HISTORY_TOKEN = _AT["history"], _AT["history_token"]
AT_N_GRAMMAR, AT_N_GRAMMAR_WORD = _AT["grammar"], _AT["grammar_word"]
AT_N_SCORE = _AT["score"]
