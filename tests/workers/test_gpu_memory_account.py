"""What is said when a GPU's memory ends, without a GPU."""

from __future__ import annotations

import pytest
import torch

from albireo.workers.engine.cuda.memory import GpuMemoryError, MemoryAccount

GIB = 1 << 30


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> MemoryAccount:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    return MemoryAccount(torch.device("cuda", 0), lambda part: None)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA: CUDA_ERROR_OUT_OF_MEMORY"),
    ],
)
def test_whoever_finds_that_it_has_ended(account: MemoryAccount, error: RuntimeError) -> None:
    said = r"of H100 ended .* CUDA graphs.*max-num-seqs"
    with pytest.raises(GpuMemoryError, match=said), account.taking("CUDA graphs"):
        raise error


def test_other_errors_are_what_they_are(account: MemoryAccount) -> None:
    illegal = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal") as caught, account.taking("CUDA graphs"):
        raise illegal
    assert not isinstance(caught.value, GpuMemoryError)


def test_each_part_is_a_phase_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter((9 * GIB, 9 * GIB, 7 * GIB, 7 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(left), 80 * GIB))
    begun: list[str] = []
    account = MemoryAccount(torch.device("cuda", 0), begun.append)
    with account.taking("the weights"):
        assert begun == ["the weights"]
    assert "the weights 2.00; 7.00 are left" in account.describe()


def test_what_is_left_of_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter((60 * GIB, 20 * GIB, 2 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 80 * GIB))
    account = MemoryAccount(torch.device("cuda", 0), lambda part: None)
    assert account.left_of(0.9) == 14 * GIB
    assert account.left_of(0.9) == -4 * GIB
