"""What the fork server loads before it forks: tokenizer, kernels, weights.

Single-threaded from the first line to the last; see forkserver.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from albireo.ipc.config import ModelInfo
from albireo.ipc.params import SamplingDefaults

from .fork_protocol import Load, Loaded
from .options import OptionError


def load_everything(load: Load, phase: Callable[[str], Any]) -> tuple[Loaded, Any, Any, Any]:
    """Returns (Loaded, TextModel, Vocabulary or None, and what a worker inherits of the model).

    That is a LoadedModel on the CPU, the ModelConfig on cuda, where each worker
    loads its own share, and None on sim.

    Raises the loaders' errors, which are made for the user.
    """
    import uvloop  # noqa: F401  imported for the router that is forked later
    import zmq  # noqa: F401

    from albireo.workers.models.load import check_degree, read_config
    from albireo.workers.tokenizer.text_model import load_text_model

    phase("reading the tokenizer")
    config = read_config(load.model_path)  # first: who has neither is told that it is no model
    dummy = load.load_format == "dummy" and load.tokenizer_path == load.model_path
    text = load_text_model(
        load.tokenizer_path, load.chat_template, config.vocab_size if dummy else None
    )
    config = _with_end_of(text, config)
    defaults = _sampling_defaults(load)
    for tp in load.tp_degrees:
        check_degree(config, tp)
    device, dtype = load.device, load.dtype
    vocabulary = model = None
    if device != "sim":
        vocabulary = _vocabulary(text, config)
        phase("importing PyTorch")
        import torch

        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        if device == "cuda":
            _import_for_cuda()
            model = config
        else:
            model = _load_weights(load, config, device, dtype, phase)
    elif dtype == "auto":
        dtype = "bfloat16"
    info = _model_info(load, config, dtype, text, defaults)
    return Loaded(info, device, dtype), text, vocabulary, model


def _with_end_of(text: Any, config: Any) -> Any:
    """The config with the tokenizer's end token among its own: many a fine-tune names the end of
    its turns there alone."""
    end = text.eos_token_id
    if end is None or end >= config.vocab_size:
        return config
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, end))))


def _sampling_defaults(load: Load) -> SamplingDefaults:
    from albireo.workers.models.generation_config import read_sampling_defaults

    directory = Path(load.model_path)
    if load.sampling_defaults == "openai" or not directory.is_dir():
        return SamplingDefaults()
    return read_sampling_defaults(directory)


def _vocabulary(text: Any, config: Any) -> Any:
    """What grammars are made with; None for a model without an end token, which no grammar ends."""
    from albireo.workers.grammar.vocabulary import Vocabulary, end_ids_of

    end_ids = end_ids_of(text, config.eos_token_ids)
    return Vocabulary(text, config.vocab_size, end_ids) if end_ids else None


def resolve_device(device: str) -> str:
    """ "auto" -> "cuda" where there is one, else "cpu".  Raises OptionError.

    NVML counts the GPUs: PyTorch's other ways would make a CUDA process of this one.
    """
    import torch

    if device == "cuda" and torch.version.cuda is None:
        raise OptionError(
            f"--device cuda: this PyTorch ({torch.__version__}) is built without CUDA; install a "
            "CUDA build of it, or use --device cpu"
        )
    if device != "auto":
        return device
    return "cuda" if torch.version.cuda and torch.cuda._device_count_nvml() > 0 else "cpu"


def resolve_dtype(dtype: str, device: str) -> str:
    """ "auto" -> bfloat16 where the device multiplies it fast, else float32."""
    import torch

    if dtype != "auto":
        return dtype
    if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16"
    return "float32"


def _import_for_cuda() -> None:
    """Triton and the engine, for the workers to inherit; makes no CUDA context."""
    import albireo.workers.engine.cuda.worker
    import albireo.workers.kernels.cuda.kernels
    import albireo.workers.models.llama  # noqa: F401


def _load_weights(
    load: Load, config: Any, device: str, dtype: str, phase: Callable[[str], Any]
) -> Any:
    import torch

    from albireo.workers.engine.loaded import LoadedModel
    from albireo.workers.kernels import create
    from albireo.workers.models.load import load_model

    kernels = create(device, getattr(torch, dtype), load.batch_invariant)
    ranks = {}
    for tp in sorted(set(load.tp_degrees)):
        phase(f"loading the weights{f' for {tp} ranks' if tp > 1 else ''}")
        ranks[tp] = load_model(
            load.model_path, config, getattr(torch, dtype), load.load_format, tp, kernels, phase
        )
    phase("compiling kernels")
    model = LoadedModel(config=config, kernels=kernels, ranks=ranks)
    model.compile()
    return model


def _mlp_elements(config: Any, element: int) -> int:
    """What a token has at once in the widest MLP: gate and up with what is made of them.

    With experts that for each one chosen, and beside it their float32 results.
    """
    widest = 0
    if not all(config.is_sparse(layer) for layer in range(config.num_layers)):
        widest = 3 * config.intermediate_size
    if config.num_experts:
        results = config.hidden_size * 4 // element
        widest = max(widest, config.experts_per_token * (3 * config.expert_size + results))
    return widest


def _model_info(
    load: Load, config: Any, dtype: str, text: Any, defaults: SamplingDefaults
) -> ModelInfo:
    element = 2 if dtype == "bfloat16" else 4
    params = config.num_params()
    kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * element
    # Residual stream and its norms; beside them what the widest layer reads and makes.
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    widest = 4 * config.hidden_size + max(2 * attention, _mlp_elements(config, element))
    head = config.vocab_size * config.hidden_size if config.tie_embeddings else 0
    ropes = len({config.rope_of(layer) for layer in range(config.num_layers)})
    return ModelInfo(
        name=load.model_name,
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        context_len=config.context_len,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
        hidden_size=config.hidden_size,
        num_params=params,
        weight_bytes=params * element,
        kv_bytes_per_token=kv_bytes,
        kv_layers=config.num_layers,
        head_dim=config.head_dim,
        tp_degrees=config.tp_degrees(),
        activation_bytes_per_token=widest * element,
        loaded_bytes=(params + head) * element,
        e4m7_params={tp: config.e4m7_params(tp) for tp in load.tp_degrees},
        layer_products=config.layer_products(),
        rope_bytes=ropes * config.context_len * config.head_dim * 4,
        strips_first_space=text.strips_first_space,
        special_ids=tuple(sorted(text.special_ids)),
        tool_style=text.tool_style,
        sampling_defaults=defaults,
    )
