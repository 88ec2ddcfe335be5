"""Host memory that is pinned in small pieces."""

from __future__ import annotations

import pytest
import torch

from albireo.workers.engine.cuda.pinned import pinned_words

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_pieces_share_no_page_and_come_and_go() -> None:
    torch.empty(1, device="cuda")
    for words in (10, 10, 80, 1025):
        kept = pinned_words(words)
        gone = pinned_words(words)
        assert kept.shape == (words,) and not kept.any()
        assert kept.data_ptr() % 4096 == gone.data_ptr() % 4096 == 0
        kept += 7
        there = torch.empty(words, dtype=torch.int32, device="cuda")
        there.copy_(kept, non_blocking=True)
        assert there.sum().item() == 7 * words
        del gone
