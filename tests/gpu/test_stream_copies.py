"""Copies by the driver's own calls."""

from __future__ import annotations

import pytest
import torch

from albireo.workers.engine.cuda.stream_copies import StreamCopies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_words_go_to_the_gpu_and_back_in_the_streams_order() -> None:
    stream = torch.cuda.Stream()
    there = torch.arange(1000, dtype=torch.int32).pin_memory()
    back = torch.zeros(1000, dtype=torch.int32).pin_memory()
    device = torch.zeros(1000, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    copies = StreamCopies(stream)
    copies.to_device(device.data_ptr(), there.data_ptr(), 4 * 900)
    with torch.cuda.stream(stream):
        device += 1
    copies.to_host(back.data_ptr() + 4, device.data_ptr(), 4 * 950)
    stream.synchronize()
    assert back.tolist() == [0, *range(1, 901), *[1] * 50, *[0] * 49]


def test_what_cuda_refuses_is_an_error() -> None:
    words = torch.zeros(4, dtype=torch.int32).pin_memory()
    copies = StreamCopies(torch.cuda.Stream())
    with pytest.raises(RuntimeError, match="16 bytes to the GPU"):
        copies.to_device(0, words.data_ptr(), 16)
    torch.cuda.synchronize()
