"""A Hugging Face directory's config.json, and its end tokens -> ModelConfig.

Called by `load.read_config`; hf_rope.py reads the rotary settings, hf_gemma3.py
what is Gemma's own.  A setting that would change the model's output and that
the layers do not have is refused with a ModelError; nothing is guessed over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import ModelConfig, RopeConfig
from .generation_config import read_generation_config
from .hf_gemma3 import FAMILY as GEMMA3
from .hf_gemma3 import gemma3_fields, gemma3_settings
from .hf_rope import read_rope
from .hf_settings import Settings, read_json

_FAMILIES = {
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3,
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
_BIASED = (GEMMA3, "llama", "qwen3", "qwen3_moe")
"""Families whose `attention_bias` means biases of all four projections."""
_LLAMA_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_DEFAULTS,
    "mistral": {**_LLAMA_DEFAULTS, "sliding_window": 4096},
    "mixtral": {**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "phi3": {"bos_token_id": 1, "eos_token_id": 32000, "rms_norm_eps": 1e-5},
    "qwen2": {"sliding_window": 4096},
    "qwen3": {"sliding_window": 4096, "head_dim": 128},
    "qwen3_moe": {"sliding_window": 4096},
}
"""By family: what transformers takes where a key is absent, if not what all have in common."""


def read_hf_config(directory: Path) -> ModelConfig:
    """Raises ModelError when the directory holds no model that the layers can run."""
    path = directory / "config.json"
    settings = Settings(path, read_json(path))
    family, architecture = _family(settings)
    if family == GEMMA3:
        settings = gemma3_settings(settings)
    else:
        settings = Settings(path, {**_DEFAULTS[family], **settings.values})
    _refuse_unsupported(settings)
    heads = settings.count("num_attention_heads")
    hidden = settings.count("hidden_size")
    kv_heads = settings.count("num_key_value_heads", heads if family in ("llama", "phi3") else None)
    head_dim = settings.count("head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise settings.error(
            f"{heads} attention heads of {head_dim} over {kv_heads} KV heads do not fit together"
        )
    biased = bool(settings.get("attention_bias", False)) and family in _BIASED
    if family == GEMMA3:
        own = gemma3_fields(settings, head_dim)
    else:
        own = {"rope": read_rope(settings, family, head_dim)}
    num_layers = settings.count("num_hidden_layers")
    window, full_layers = _windows(settings, family, num_layers)
    return ModelConfig(
        family=family,
        architecture=architecture,
        vocab_size=settings.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=settings.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=settings.number("rms_norm_eps", 1e-6),
        context_len=_context_len(settings, own["rope"]),
        tie_embeddings=bool(settings.get("tie_word_embeddings", False)),
        qkv_bias=biased or family == "qwen2",
        o_bias=biased,
        mlp_bias=bool(settings.get("mlp_bias", False)) and family == "llama",
        qk_norm=family in (GEMMA3, "qwen3", "qwen3_moe"),
        sliding_window=window,
        full_layers=full_layers,
        **own,
        **_experts(settings, family, num_layers),
        eos_token_ids=_eos_token_ids(settings, directory),
        bos_token_id=settings.get("bos_token_id"),
    )


def _family(settings: Settings) -> tuple[str, str]:
    names = settings.get("architectures", [])
    if isinstance(names, list):
        for name in names:
            if name in _FAMILIES:
                return _FAMILIES[name], name
    raise settings.error(
        f"architectures {names!r} (model_type {settings.get('model_type')!r}) is not supported; "
        f"supported are {', '.join(_FAMILIES)}"
    )


def _refuse_unsupported(settings: Settings) -> None:
    activation = settings.get("hidden_act", "silu")
    if activation != "silu":
        raise settings.error(f"hidden_act {activation!r} is not supported, only 'silu' is")
    if settings.get("quantization_config"):
        method = settings.get("quantization_config").get("quant_method", "unknown")
        raise settings.error(
            f"weights quantised with {method!r} are not supported; use the bfloat16 original or "
            "a GGUF file"
        )


def _experts(settings: Settings, family: str, layers: int) -> dict[str, Any]:
    """ModelConfig's settings of a mixture of experts, none for a dense model."""
    if family not in ("mixtral", "qwen3_moe"):
        return {}
    is_mixtral = family == "mixtral"
    of_experts = "num_local_experts" if is_mixtral or settings.has("num_local_experts") else ""
    count = settings.count(of_experts or "num_experts")
    chosen = settings.count("num_experts_per_tok")
    if chosen > count:
        raise settings.error(f"num_experts_per_tok {chosen} exceeds the {count} experts")
    size = settings.count("intermediate_size" if is_mixtral else "moe_intermediate_size")
    every = 1 if is_mixtral else settings.count("decoder_sparse_step", 1)
    dense = set() if is_mixtral else set(settings.get("mlp_only_layers", []))
    return {
        "num_experts": count,
        "expert_size": size,
        "experts_per_token": chosen,
        "normalise_experts": is_mixtral or bool(settings.get("norm_topk_prob", False)),
        "dense_layers": frozenset(
            layer for layer in range(layers) if layer in dense or (layer + 1) % every
        ),
    }


def _context_len(settings: Settings, rope: RopeConfig) -> int:
    """YaRN stretches the original length; max_position_embeddings may be either.

    LongRoPE has other frequencies for sequences beyond the original length, which
    would turn keys that are cached already: up to that length it is exact.
    """
    length = settings.count("max_position_embeddings")
    if rope.kind == "yarn":
        return max(length, int(rope.factor * rope.original_max_position_embeddings))
    if rope.kind == "longrope":
        return min(length, rope.original_max_position_embeddings)
    return length


def _windows(settings: Settings, family: str, layers: int) -> tuple[int, frozenset[int]]:
    """The sliding window, 0 for none, and the layers that see everything nevertheless."""
    window, full_below = 0, 0
    if family == GEMMA3:
        window = settings.count("sliding_window")
    elif family in ("mistral", "mixtral", "phi3"):
        window = settings.get("sliding_window", 0)
    elif family.startswith("qwen") and settings.get("use_sliding_window"):
        window = settings.get("sliding_window", 0)
        full_below = settings.get("max_window_layers", 28) if family != "qwen3_moe" else 0
    if not window:
        return 0, frozenset()
    window = settings.count("sliding_window", window)
    kinds = settings.get("layer_types") or [
        "sliding_attention" if layer >= full_below else "full_attention" for layer in range(layers)
    ]
    if len(kinds) != layers or not {"sliding_attention", "full_attention"}.issuperset(kinds):
        raise settings.error(
            f"layer_types {kinds!r} is not supported: 'sliding_attention' or 'full_attention' "
            f"for each of {layers} layers is expected"
        )
    full = frozenset(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    return (0, frozenset()) if len(full) == layers else (window, full)


def _eos_token_ids(settings: Settings, directory: Path) -> tuple[int, ...]:
    """End tokens of generation_config.json where it names some, else of config.json."""
    found = read_generation_config(directory).get("eos_token_id")
    if found is None:
        found = settings.get("eos_token_id", [])
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) for token in ids):
        raise settings.error(f"eos_token_id {found!r} is neither a token id nor a list of them")
    return tuple(ids)
