"""What is read from config.json and from GGUF metadata, and what is refused there."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from albireo.workers.kernels import create
from albireo.workers.kernels.cuda.e4m7 import fits
from albireo.workers.layers.rope import rope_table
from albireo.workers.models.config import ModelError
from albireo.workers.models.gguf_file import GGUFFile
from albireo.workers.models.load import load_rank, read_config

from .tiny_gguf import write_gguf
from .tiny_models import TINY, save

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
_QWEN2 = {**_LLAMA, "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}

_PHI3 = {**_LLAMA, "architectures": ["Phi3ForCausalLM"]}


def write_config(directory: Path, settings: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_counted_as_transformers_does(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    config = read_config(tmp_path)
    assert config.num_params() == model.num_parameters()
    assert config.family == model.config.model_type
    assert TINY[name].tp in config.tp_degrees()


def test_end_tokens_are_those_of_the_generation_config(tmp_path: Path) -> None:
    write_config(tmp_path, {**_LLAMA, "eos_token_id": 5, "bos_token_id": 1})
    assert read_config(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_config(tmp_path).eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert read_config(tmp_path).eos_token_ids == (5,)
    assert read_config(tmp_path).bos_token_id == 1


@pytest.mark.parametrize(
    "key", ["rms_norm_eps", "rope_parameters", "bos_token_id", "eos_token_id", "sliding_window",
            "max_window_layers", "head_dim", "tie_word_embeddings"],
)  # fmt: skip
@pytest.mark.parametrize(
    "kind", ["Llama", "Mistral", "Mixtral", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe"]
)
def test_a_key_that_is_left_out_is_as_in_transformers(kind: str, key: str, tmp_path: Path) -> None:
    windows = {"use_sliding_window": True} if kind.startswith("Qwen") else {}
    config = getattr(transformers, f"{kind}Config")(**windows)
    settings = json.loads(config.to_json_string(use_diff=False))
    settings["architectures"] = [f"{kind}ForCausalLM"]
    whole = read_config(write_config(tmp_path, settings))
    assert whole.sliding_window == (getattr(config, "sliding_window", None) or 0)
    settings.pop(key, None)
    assert read_config(write_config(tmp_path, settings)) == whole


def test_an_end_token_that_is_null_is_none(tmp_path: Path) -> None:
    write_config(tmp_path, {**_LLAMA, "eos_token_id": None})
    assert read_config(tmp_path).eos_token_ids == ()


def test_yarn_stretches_the_context(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert read_config(write_config(tmp_path, {**_LLAMA, "rope_scaling": yarn})).context_len == 2048


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 256}, 256),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 0),
        ({"architectures": ["MistralForCausalLM"]}, 4096),
        ({"sliding_window": 256}, 0),
        ({"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 0}, 256),
        ({"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 2}, 0),
        ({"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 28}, 0),
    ],
)
def test_sliding_windows(settings: dict[str, Any], window: int, tmp_path: Path) -> None:
    write_config(tmp_path, {**_QWEN2, **settings})
    assert read_config(tmp_path).sliding_window == window


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, r"\['GemmaForCausalLM'\].* is not supported"),
        ({"architectures": None}, "supported are Gemma3ForCausalLM, .*, LlamaForCausalLM"),
        ({"hidden_size": None}, "hidden_size is None, but has to be a whole number above 0"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"num_key_value_heads": 3}, "4 attention heads of 16 over 3 KV heads do not fit"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'.*GGUF"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic'.*default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor is None, but has to be a number above 0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor is '2'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "differ between layers",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({**_PHI3, "partial_rotary_factor": 0.45}, "rotates 7 of a head's 16 dimensions"),
        ({**_PHI3, "rope_scaling": {"type": "llama3"}}, "'llama3' is not supported"),
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>' is neither"),
    ],
)
def test_unsupported_settings_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_config(tmp_path, {**_LLAMA, **settings})
    with pytest.raises(ModelError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_layers_of_different_attention(tmp_path: Path) -> None:
    mixed = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    write_config(tmp_path, {**_QWEN2, **mixed})
    config = read_config(tmp_path)
    assert [config.window(layer) for layer in range(2)] == [0, 64]
    write_config(tmp_path, {**_QWEN2, **mixed, "layer_types": ["full_attention", "chunked"]})
    with pytest.raises(ModelError, match=r"layer_types \['full_attention', 'chunked'\] is not"):
        read_config(tmp_path)


def test_longrope_serves_the_length_for_which_it_is_exact(tmp_path: Path) -> None:
    rope = {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8}
    stretched = {**_PHI3, "rope_scaling": rope, "original_max_position_embeddings": 128}
    config = read_config(write_config(tmp_path, stretched))
    assert config.context_len == 128
    assert config.rope.frequency_factors == (1.5,) * 8
    for factors, message in (([1.0] * 6, "a list of 8 numbers"), (None, "short_factor is None")):
        rope["short_factor"] = factors
        with pytest.raises(ModelError, match=message):
            read_config(write_config(tmp_path, stretched))


def test_paths_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or directory"):
        read_config(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"is no model directory: it has no config.json$"):
        read_config(tmp_path)
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"to run a GGUF file, name it: .*weights\.gguf"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read as JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="a JSON object is expected, found list"):
        read_config(tmp_path)


def test_reading_a_config_does_not_import_torch(tmp_path: Path) -> None:
    write_config(tmp_path, _LLAMA)
    code = (
        "import sys; from albireo.workers.models.load import read_config; "
        f"read_config({str(tmp_path)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        "gemma3-period", "llama", "llama-tied", "llama-biases", "mixtral", "phi3", "phi3-window",
        "phi4-mini", "qwen2", "qwen3", "qwen3-moe",
    ],
)  # fmt: skip
def test_gguf_says_what_the_directory_says(name: str, tmp_path: Path) -> None:
    write_gguf(save(name, tmp_path), tmp_path / "model.gguf")
    found, wanted = read_config(tmp_path / "model.gguf"), read_config(tmp_path)
    for field in wanted.__slots__:
        if field == "rms_norm_eps":
            assert found.rms_norm_eps == pytest.approx(wanted.rms_norm_eps)
        elif field == "rope" and wanted.rope.kind == "longrope":
            assert (
                rope_table(found.rope, 16, 64).sub(rope_table(wanted.rope, 16, 64)).abs().max()
                < 1e-5
            )
            assert found.rope.rotary_dim == wanted.rope.rotary_dim
        else:
            assert getattr(found, field) == getattr(wanted, field), field


def test_gguf_rope_scaling(tmp_path: Path) -> None:
    def table(**options: Any) -> torch.Tensor:
        write_gguf(TINY["llama"].build(), tmp_path / "model.gguf", **options)
        return rope_table(read_config(tmp_path / "model.gguf").rope, 16, 256)

    def directory_table(name: str) -> torch.Tensor:
        save(name, tmp_path)
        return rope_table(read_config(tmp_path).rope, 16, 256)

    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}
    torch.testing.assert_close(table(fields=linear), directory_table("linear-rope"))
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        torch.testing.assert_close(table(fields={key: 3.0}), table(fields=linear))
    zero = {"rope.scaling.factor": 0.0, "rope.scale_linear": 3.0}
    torch.testing.assert_close(table(fields=zero), table(fields=linear))
    for off in (
        {"rope.scaling.type": "none", "rope.scaling.factor": 3.0},
        {"rope.scale_linear": 0.0},
    ):
        torch.testing.assert_close(table(fields=off), table())
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }
    torch.testing.assert_close(table(fields=yarn), directory_table("yarn-rope"))
    factors = [float(2**i) for i in range(8)]
    divided = table(rope_factors=factors)[1, 8:].asin()
    torch.testing.assert_close(divided * torch.tensor(factors), table()[1, 8:].asin())


@pytest.mark.parametrize(
    ("name", "tokens", "types", "eos", "ends"),
    [
        ("phi3", "<unk> <s> </s> <|endoftext|> <|user|> <|end|>", [2, 3, 3, 3, 3, 3], 3, (3, 5)),
        ("phi3", "<unk> <s> </s> <|endoftext|> <|user|> <|end|>", [2, 3, 3, 4, 4, 4], 3, (3, 5)),
        ("llama", "a <|end_of_text|> <|eot_id|> <|eom_id|>", [1, 3, 3, 3], 1, (1, 2, 3)),
        ("qwen2", "! <|endoftext|> <|im_start|> <|im_end|>", [1, 3, 3, 3], 3, (3, 1)),
        ("gemma3-period", "<pad> <bos> <eos> <end_of_turn>", [3, 3, 3, 3], 2, (2, 3)),
        ("llama", "<s> </s> <|end|> <|eot_id|>", [3, 3, 1, 5], 1, (1,)),
        ("llama", "<s> </s> <|end|>", None, 1, (1,)),
    ],
)
def test_gguf_files_name_one_end_and_have_more(
    name: str, tokens: str, types: list[int] | None, eos: int, ends: tuple[int, ...], tmp_path: Path
) -> None:
    """The end of a turn is known by its text, where it is no word of the vocabulary."""
    model = TINY[name].build()
    model.config.eos_token_id = eos
    path = tmp_path / "model.gguf"
    write_gguf(model, path, tokens=tokens.encode().split(), types=types)
    assert read_config(path).eos_token_ids == ends


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope': supported are"),
        (
            {"rope.dimension_count": 8},
            "rope.dimension_count is 8: other than the head's dimension 16",
        ),
        ({"expert_count": 8}, "expert_used_count is None: a whole number above 0"),
        ({"expert_count": 2, "expert_used_count": 3}, "expert_used_count is 3: exceeds the 2"),
        ({"expert_count": 2, "expert_gating_func": 2}, "expert_gating_func is 2: only 1"),
        ({"expert_count": 2, "expert_shared_count": 1}, "shared experts are not supported"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": -1.0},
            "factor is -1.0, but has to be",
        ),
    ],
)
def test_unsupported_gguf_settings_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_gguf(TINY["llama"].build(), tmp_path / "model.gguf", fields=fields)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path / "model.gguf")


def test_experts_in_a_gguf_file_of_a_dense_family(tmp_path: Path) -> None:
    write_gguf(TINY["qwen3"].build(), tmp_path / "model.gguf", fields={"expert_count": 4})
    with pytest.raises(ModelError, match="expert_count is 4: experts are not supported in qwen3"):
        read_config(tmp_path / "model.gguf")


def test_gguf_fields_of_every_type(tmp_path: Path) -> None:
    write_gguf(TINY["llama"].build(), tmp_path / "model.gguf", fields={"name": "ä", "x": 1.5})
    file = GGUFFile(tmp_path / "model.gguf")
    assert file.get("llama.name") == "ä"
    assert file.get("llama.x") == 1.5
    assert file.get("tokenizer.ggml.tokens") == ["<unk>", "<s>", "</s> é"]
    assert file.get("nothing", 7) == 7
    assert file.tensors["token_embd.weight"].shape == (96, 64)


def test_damaged_gguf_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content, message in (
        (b"", "cannot be read"),
        (b"PK\x03\x04 a zip file", r"not a GGUF file: it begins with b'PK\\x03\\x04'"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "GGUF version 0x1 is not supported"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1, 0), "header runs past the end of the file, 24 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            read_config(path)
    for alignment in (struct.pack("<II", 4, 0), struct.pack("<IQs", 8, 1, b"x")):
        key = b"general.alignment"
        field = struct.pack("<Q", len(key)) + key + alignment
        path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + field)
        with pytest.raises(ModelError, match=r"general\.alignment is (0|'x'): .* above 0"):
            read_config(path)
    write_gguf(TINY["llama"].build(), path)
    whole = path.read_bytes()
    for length in (6, 30, 100, 300, 700, 1200):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=f"past the end of the file, {length} bytes"):
            read_config(path)
    path.write_bytes(whole.replace(b"llama", b"gemma"))
    with pytest.raises(ModelError, match="architecture 'gemma' is not supported"):
        read_config(path)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("sizes", [{}, {"intermediate_size": 128}, {"hidden_size": 96}])
def test_weights_of_12_bits_are_counted_as_ranks_have_them(
    sizes: dict[str, int], tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(write_config(tmp_path, {**_QWEN2, **sizes, "head_dim": 16}))
    kernels = create("cpu", torch.bfloat16, False)
    packed: list[int] = []

    def pack_linear(weight: torch.Tensor, *_: Any, **__: Any) -> None:
        packed.append(weight.numel() * fits(weight))

    monkeypatch.setattr(kernels, "pack_linear", pack_linear)
    for rank in range(tp):
        load_rank("", config, torch.bfloat16, "dummy", tp, rank, kernels, str)
    assert config.e4m7_params(tp) == sum(packed)
