"""A brief forward pass launches every kind of kernel that the whole one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from albireo.workers.engine.batch import StepBatch
from albireo.workers.kernels.interface import Kernels, KVLayer
from albireo.workers.models.llama import Model
from albireo.workers.parallel.communicator import Communicator

from .paged_run import PagedRun
from .reference_kernels import ReferenceKernels
from .test_models import load
from .tiny_models import TINY, prompts, save

_LAUNCHING = {
    "linear", "gated_linear", "embed", "rms_norm", "add_rms_norm", "rope_and_cache", "attention",
    "silu_mul", "gelu_mul", "experts",
}  # fmt: skip


def sketch(argument: Any) -> Any:
    """What of an argument a kernel may be chosen by, or compiled for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape
    if isinstance(argument, list | tuple):
        return tuple(map(sketch, argument))
    return type(argument) if isinstance(argument, KVLayer | StepBatch) else argument


def loaded(name: str, directory: Path, kernels: Kernels, tp: int = 1) -> list[Model]:
    """The ranks of the tiny model of that name, which is saved in the directory."""
    save(name, directory)
    return load(directory, kernels, tp)


class Listening(ReferenceKernels):
    """calls: what has been launched, each kind once."""

    def __init__(self) -> None:
        self.calls: set[Any] = set()

    def reads(self, packed: Any, rows: int) -> torch.Tensor | None:
        return packed[0]  # type: ignore[no-any-return]

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in _LAUNCHING:
            return method

        def launch(*arguments: Any, **named: Any) -> Any:
            self.calls.add((name, sketch(arguments), sketch(tuple(sorted(named.items())))))
            return method(*arguments, **named)

        return launch


class Sums:
    """calls: the sums that a rank makes, by what their kernels depend on; if alone, with nobody."""

    def __init__(self, real: Communicator, is_alone: bool) -> None:
        self.rank, self.size = real.rank, real.size
        self.calls: list[Any] = []
        self._real = None if is_alone else real

    def all_reduce(self, x: torch.Tensor) -> None:
        self.calls.append(("all_reduce", sketch(x)))
        if self._real:
            self._real.all_reduce(x)

    def sum_norm(self, *arguments: Any) -> None:
        self.calls.append(("sum_norm", sketch(arguments)))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("sampled", [1.0, 0.2])
def test_every_kind_is_launched(
    name: str, sampled: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Listening()
    models = loaded(name, tmp_path, kernels)
    forward: Callable[..., torch.Tensor] = Model.forward
    steps = []

    def both(model: Model, batch: StepBatch, kv: list[KVLayer]) -> torch.Tensor:
        kernels.calls.clear()
        brief = forward(model, batch, kv, is_brief=True)
        launched = kernels.calls.copy()
        kernels.calls.clear()
        logits = forward(model, batch, kv)
        assert (brief.shape, brief.dtype) == (logits.shape, logits.dtype)
        assert launched == kernels.calls
        steps.append(launched)
        return logits

    monkeypatch.setattr(Model, "forward", both)
    PagedRun(models, kernels, torch.float32, prompts(), sampled=sampled).logits()
    assert len(steps) > 5 and all(len(launched) > 5 for launched in steps)


@pytest.mark.parametrize("name", ["llama", "gemma3-period", "qwen3-moe-mixed"])
def test_ranks_sum_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them in the same order, and of each kind that the whole pass has."""
    kernels, tp = Listening(), TINY[name].tp
    models = loaded(name, tmp_path, kernels, tp)
    forward: Callable[..., torch.Tensor] = Model.forward
    steps: list[list[Any]] = [[] for _ in range(tp)]

    def both(model: Model, batch: StepBatch, kv: list[KVLayer]) -> torch.Tensor:
        real = model.communicator
        brief, whole = Sums(real, is_alone=True), Sums(real, is_alone=False)
        model.communicator = brief
        forward(model, batch, kv, is_brief=True)
        model.communicator = whole
        logits = forward(model, batch, kv)
        model.communicator = real
        assert set(brief.calls) == set(whole.calls) and len(brief.calls) <= len(whole.calls)
        steps[model.rank].append(brief.calls)
        return logits

    monkeypatch.setattr(Model, "forward", both)
    PagedRun(models, kernels, torch.float32, prompts(), sampled=0.2).logits()
    assert len(steps[0]) > 5 and all(each == steps[0] for each in steps)


def test_it_runs_a_layer_of_each_kind(tmp_path: Path) -> None:
    """Windowed layers and one that is not, of seven."""
    (model,) = loaded("gemma3-period", tmp_path, ReferenceKernels())
    assert model._first_of_each_kind() == [0, 5] and model.config.num_layers == 7
