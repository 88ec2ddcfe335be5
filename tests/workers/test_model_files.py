"""Files of weights: quantised blocks, and errors that name file, tensor, sizes and a way out."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as package_dequantize
from safetensors.torch import load_file, save_file

from albireo.workers.models.config import ModelError
from albireo.workers.models.dequantize import dequantize, row_bytes
from albireo.workers.models.load import load_model, read_config

from .reference_kernels import ReferenceKernels
from .tiny_gguf import write_gguf
from .tiny_models import TINY, save


def load(path: Path, load_format: str = "auto") -> None:
    load_model(
        path, read_config(path), torch.float32, load_format, 1, ReferenceKernels(), lambda _: None
    )


def edit(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces tensors of model.safetensors, or drops them; "__" in a name stands for "."."""
    path = directory / "model.safetensors"
    content = load_file(path)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        content.pop(name)
        if tensor is not None:
            content[name] = tensor
    save_file(content, path)


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32"]
)
def test_dequantised_as_by_the_gguf_package(kind: str) -> None:
    quantization = GGMLQuantizationType[kind]
    rng = np.random.default_rng(3)
    rows, columns = 1100, 512  # more than one piece
    raw = rng.integers(0, 256, (rows, row_bytes(quantization, columns)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = package_dequantize(raw, quantization)
        found = dequantize(torch.from_numpy(raw), quantization, columns, torch.float32)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    save("llama", tmp_path, max_shard_size="60KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    (tmp_path / shards[1]).unlink()
    with pytest.raises(ModelError, match=f"1 of {len(shards)} shards .* are missing: {shards[1]}"):
        load(tmp_path)


def test_a_shard_that_is_truncated(tmp_path: Path) -> None:
    save("llama", tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    message = f"{shard}: is truncated.* {len(whole)} bytes, but the file has {len(whole) - 1000}"
    with pytest.raises(ModelError, match=message):
        load(tmp_path)
    for content in (b"", whole[:5], whole[:100]):
        shard.write_bytes(content)
        with pytest.raises(ModelError, match=f"no whole safetensors file: {len(content)} bytes"):
            load(tmp_path)
    shard.write_bytes(struct.pack("<Q", 4) + b"{{{{")
    with pytest.raises(ModelError, match="its header is damaged"):
        load(tmp_path)


def test_an_index_that_is_damaged(tmp_path: Path) -> None:
    save("llama", tmp_path, max_shard_size="60KB")
    for content in ("", "{}", "[]", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ModelError, match=r"index.json: cannot be read"):
            load(tmp_path)


def test_tensors_that_are_missing(tmp_path: Path) -> None:
    save("llama", tmp_path)
    edit(tmp_path, model__layers__1__mlp__up_proj__weight=None)
    message = r"\(model.safetensors\): model.layers.1.mlp.up_proj.weight: the tensor is missing;"
    with pytest.raises(ModelError, match=message):
        load(tmp_path)
    edit(tmp_path, lm_head__weight=None)
    with pytest.raises(ModelError, match=r"missing \(and 1 others: lm_head.weight\)"):
        load(tmp_path)


def test_a_tensor_of_another_shape(tmp_path: Path) -> None:
    save("llama", tmp_path)
    edit(tmp_path, model__layers__0__self_attn__k_proj__weight=torch.zeros(48, 64))
    message = (
        "model.safetensors: model.layers.0.self_attn.k_proj.weight: has shape "
        r"\[48, 64\], but the config asks for \[32, 64\]; .*fetch the model again"
    )
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_a_tensor_of_a_type_that_is_not_read(tmp_path: Path) -> None:
    save("llama", tmp_path)
    edit(tmp_path, model__norm__weight=torch.ones(64).to(torch.float8_e4m3fn))
    with pytest.raises(ModelError, match=r"model\.norm\.weight: weights of type F8_E4M3 are not"):
        load(tmp_path)


def test_pickle_files_are_not_read(tmp_path: Path) -> None:
    save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor .*index\.json"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only pytorch_model.bin, and pickle files are not read"):
        load(tmp_path)


def test_an_unknown_load_format(tmp_path: Path) -> None:
    save("llama", tmp_path)
    with pytest.raises(ModelError, match="'fast' is unknown; it is 'auto' or 'dummy'"):
        load(tmp_path, "fast")


def test_the_index_may_name_more_than_is_needed(tmp_path: Path) -> None:
    """An output layer beside tied embeddings is left alone, as transformers does."""
    save("llama", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    load(tmp_path)


def test_a_gguf_file_that_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(TINY["llama"].build(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000])
    message = rf"tensor \S+ ends at byte \d+, but the file has {len(whole) - 5000}; .*fetch"
    with pytest.raises(ModelError, match=message):
        load(path)


def test_a_gguf_file_without_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(TINY["llama"].build(), path)
    path.write_bytes(path.read_bytes().replace(b"blk.2.ffn_up.weight", b"blk.2.ffn_xx.weight"))
    with pytest.raises(ModelError, match=r"model.gguf: blk.2.ffn_up.weight: the tensor is missing"):
        load(path)


def test_a_gguf_type_that_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(TINY["llama"].build(), path)
    name = b"blk.0.ffn_up.weight"
    content = bytearray(path.read_bytes())
    content[content.index(name) + len(name) + 4 + 2 * 8] = 250
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"tensor blk.0.ffn_up.weight: 250 is not a valid"):
        load(path)


@pytest.mark.parametrize("length", [2**32, 2**63, 2**64 - 1])
def test_a_gguf_string_of_absurd_length(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, length) + b"key" + bytes(64))
    with pytest.raises(ModelError, match="past the end of the file"):
        read_config(path)
