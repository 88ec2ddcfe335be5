"""Every family, from every kind of file, gives transformers' logits at every position."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from albireo.workers.kernels import create
from albireo.workers.kernels.interface import Kernels
from albireo.workers.models.config import ModelError
from albireo.workers.models.llama import Model
from albireo.workers.models.load import check_degree, load_model, read_config

from .paged_run import PagedRun, ThreadCommunicator
from .reference_kernels import ReferenceKernels
from .tiny_gguf import round_weights, write_gguf
from .tiny_models import TINY, expected_logits, prompts, save

_TOLERANCE = 1e-4


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "reference":
        return ReferenceKernels()
    return create("cpu", torch.float32, batch_invariant=False)


def load(
    path: Path, kernels: Kernels, tp: int = 1, dtype: torch.dtype = torch.float32
) -> list[Model]:
    return load_model(path, read_config(path), dtype, "auto", tp, kernels, lambda _: None)


def run(models: list[Model], kernels: Kernels, dtype: torch.dtype = torch.float32, **options):
    return PagedRun(models, kernels, dtype, prompts(), **options).logits()


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(name: str, tmp_path: Path, kernels: Kernels) -> None:
    reference = save(name, tmp_path)
    expected = [expected_logits(reference, tokens) for tokens in prompts()]
    single = run(load(tmp_path, kernels), kernels)
    for found, wanted in zip(single, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=_TOLERANCE)
    split = run(load(tmp_path, kernels, TINY[name].tp), kernels, seed=5)
    for found, wanted in zip(split, single, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=_TOLERANCE)


def test_sharded_safetensors(tmp_path: Path, kernels: Kernels) -> None:
    save("qwen3", tmp_path / "whole")
    save("qwen3", tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole = run(load(tmp_path / "whole", kernels), kernels)
    shards = run(load(tmp_path / "shards", kernels), kernels)
    assert all(torch.equal(a, b) for a, b in zip(whole, shards, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_only_sampled_rows_have_logits(name: str, tmp_path: Path, kernels: Kernels) -> None:
    """And they alone go through the MLP of the last layer."""
    save(name, tmp_path)
    models = load(tmp_path, kernels)
    every = run(models, kernels)
    last, through = models[0]._layers[-1], []
    mlp = last._mlp

    def counting(x: torch.Tensor) -> torch.Tensor:
        through.append(len(x))
        return mlp(x)

    last._mlp = counting
    some = run(models, kernels, sampled=0.2)
    sampled = 0
    for all_rows, few_rows in zip(every, some, strict=True):
        rows = ~few_rows.isnan().any(1)
        sampled += int(rows.sum())
        torch.testing.assert_close(few_rows[rows], all_rows[rows], rtol=0, atol=_TOLERANCE)
    assert 0 < sampled == sum(through) < sum(len(rows) for rows in every) / 2


@pytest.mark.parametrize(
    ("name", "source"),
    [("qwen2", torch.bfloat16), ("qwen2", torch.float16), ("gemma3-untied", torch.bfloat16)],
)
def test_bfloat16_is_near_float32(name: str, source: torch.dtype, tmp_path: Path) -> None:
    TINY[name].build().to(source).save_pretrained(tmp_path)
    plain = ReferenceKernels()
    exact = torch.cat(run(load(tmp_path, plain), plain))
    for kernels in (plain, create("cpu", torch.bfloat16, batch_invariant=False)):
        for tp in (1, 3):
            models = load(tmp_path, kernels, tp, torch.bfloat16)
            rounded = torch.cat(run(models, kernels, torch.bfloat16))
            assert (rounded - exact).std() < 0.08 * exact.std()


@pytest.mark.parametrize("file", ["model.safetensors", "model.gguf"])
def test_nothing_of_the_files_is_kept(file: str, tmp_path: Path, kernels: Kernels) -> None:
    write_gguf(save("qwen3", tmp_path), tmp_path / "model.gguf")
    models = load(tmp_path / file if file.endswith(".gguf") else tmp_path, kernels)
    before = run(models, kernels)
    with (tmp_path / file).open("r+b") as opened:
        opened.write(bytes((tmp_path / file).stat().st_size))
    assert all(torch.equal(a, b) for a, b in zip(before, run(models, kernels), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "gemma3-period", "llama", "llama-3-ranks", "llama-biases", "mistral", "mixtral",
        "phi3-partial", "qwen2", "qwen3", "qwen3-moe",
    ],
)  # fmt: skip
def test_gguf_equals_the_directory(name: str, tmp_path: Path, kernels: Kernels) -> None:
    reference = save(name, tmp_path)
    write_gguf(reference, tmp_path / "model")
    for tp in (1, TINY[name].tp):
        directory = run(load(tmp_path, kernels, tp), kernels)
        file = run(load(tmp_path / "model", kernels, tp), kernels)
        assert all(torch.equal(a, b) for a, b in zip(directory, file, strict=True))


@pytest.mark.parametrize(
    ("name", "weight_type"),
    [
        *(("llama-tied", kind) for kind in ("Q8_0", "Q4_0", "Q4_1", "F16", "BF16")),
        ("gemma3-period", "Q8_0"),
        ("mixtral", "Q4_0"),
    ],
)
def test_quantised_gguf_equals_its_rounded_weights(
    name: str, weight_type: str, tmp_path: Path
) -> None:
    kernels = ReferenceKernels()
    kind = GGMLQuantizationType[weight_type]
    model = TINY[name].build()
    write_gguf(model, tmp_path / "model.gguf", kind)
    round_weights(model, kind)
    model.save_pretrained(tmp_path)
    for tp in (1, 2):
        directory = run(load(tmp_path, kernels, tp), kernels)
        file = run(load(tmp_path / "model.gguf", kernels, tp), kernels)
        assert all(torch.equal(a, b) for a, b in zip(directory, file, strict=True))


def test_dummy_weights(tmp_path: Path) -> None:
    kernels = ReferenceKernels()
    save("qwen3-biases", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = read_config(tmp_path)

    def dummy(tp: int) -> torch.Tensor:
        models = load_model(tmp_path, config, torch.float32, "dummy", tp, kernels, lambda _: None)
        return torch.cat(run(models, kernels))

    logits = dummy(1)
    assert torch.equal(logits, dummy(1))
    torch.testing.assert_close(dummy(2), logits, rtol=0, atol=_TOLERANCE)
    assert 0.01 < logits.std() < 10
    assert len(logits.argmax(1).unique()) > 10


def test_a_degree_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    save("llama-3-ranks", tmp_path)
    message = "into 2 ranks: it has 6 heads, 3 KV heads.*degrees that divide all of them: 1, 3$"
    with pytest.raises(ModelError, match=message):
        load(tmp_path, ReferenceKernels(), 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama", "2 KV heads, an MLP of 96 and a vocabulary of 96;"),
        ("qwen3-moe", r"2 KV heads, experts of \d+ and a vocabulary of 96;"),
        ("qwen3-moe-mixed", r"2 KV heads, an MLP of 96, experts of \d+ and a vocabulary of 96;"),
    ],
)
def test_a_refused_degree_names_the_sizes_that_are_divided(
    name: str, said: str, tmp_path: Path
) -> None:
    save(name, tmp_path)
    with pytest.raises(ModelError, match=said):
        check_degree(read_config(tmp_path), 5)


def test_a_communicator_must_be_that_of_the_rank(tmp_path: Path) -> None:
    save("llama", tmp_path)
    first, second = load(tmp_path, ReferenceKernels(), 2)
    assert (first.rank, second.rank, first.tp) == (0, 1, 2)
    with pytest.raises(RuntimeError, match="rank 1 of 2 has no communicator"):
        _ = second.communicator
    with pytest.raises(ValueError, match="rank 0 of 3, but the weights are those of rank 0 of 2"):
        first.communicator = ThreadCommunicator(0, 3, None)


def test_progress_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path)
    monkeypatch.setattr("albireo.workers.models.load._PROGRESS_INTERVAL_S", 0.0)
    lines: list[str] = []
    load_model(
        tmp_path, read_config(tmp_path), torch.float32, "auto", 1, ReferenceKernels(), lines.append
    )
    assert lines[-1] == "loading the weights: layer 2 of 3"
