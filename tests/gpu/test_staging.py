"""Weights of host memory on their way to the GPU: every byte, whatever their strides."""

from __future__ import annotations

import pytest
import torch

from albireo.workers.kernels.cuda import staging

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from albireo.workers.kernels import create

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def hold_back() -> None:
    """The GPU fetches nothing for a while: who does not wait for it writes over what it needs."""
    torch.cuda._sleep(100_000_000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("buffer_bytes", [1 << 10, 1 << 14, 1 << 20])
def test_every_byte_arrives(
    buffer_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many pieces, while their buffers are used again; of rows that no buffer holds."""
    monkeypatch.setattr(staging, "_BUFFER_BYTES", buffer_bytes)
    monkeypatch.setattr(staging, "_SMALL_BYTES", 1 << 8)
    staged = staging.Staging(DEVICE)
    hold_back()
    whole = drawn(301, 520).to(dtype)
    weights = [
        whole, whole[7:300], whole[:, 260:], whole.narrow(1, 3, 130), whole.t(), whole[3],
        whole[:1], whole[:0], drawn(6, 50, 30).to(dtype), drawn(5).to(dtype),
    ]  # fmt: skip
    fetched = [staged.fetch(weight) for weight in weights]
    for weight, found in zip(weights, fetched, strict=True):
        assert found.is_cuda and found.is_contiguous() and found.dtype == dtype
        assert torch.equal(found.cpu(), weight)


def test_what_is_read_may_change_at_once() -> None:
    kernels = create("cuda", torch.bfloat16, False)
    memory = torch.empty(8192, 1024, dtype=torch.bfloat16)
    with kernels.loading(4):
        hold_back()
        found = [kernels.fetch(memory.fill_(number)) for number in range(8)]
        assert kernels.fetch(found[0]) is found[0]
    assert [(x.min().item(), x.max().item()) for x in found] == [(n, n) for n in range(8)]


def test_threads_are_there_for_the_time_of_loading() -> None:
    kernels = create("cuda", torch.float32, False)
    before = torch.get_num_threads()
    with pytest.raises(KeyError), kernels.loading(before + 2):
        assert torch.get_num_threads() == before + 2
        raise KeyError
    assert torch.get_num_threads() == before
    assert kernels.fetch(torch.ones(3, 2)).is_cuda
