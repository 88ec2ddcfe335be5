"""What the user asked for: the options of `albireo node start`, parsed and frozen."""

from __future__ import annotations

import re

import msgspec

DEVICES = ("auto", "cpu", "cuda", "sim")
DTYPES = ("auto", "bfloat16", "float32")


class OptionError(ValueError):
    """An option cannot be satisfied; the text says why and what would work."""


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `albireo node start`; None = decided from the model and the machine.

    groups: TP degree of each group, e.g. (4, 4) for "2x4".
    kv_cache_gib: memory for the KV cache of one group.
    gpu_memory_utilization: share of a GPU's free memory that its worker may take.
    """

    name: str = "default"
    model: str = "demo"
    served_model_name: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    groups: tuple[int, ...] = (1,)
    device: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_num_queued_reqs: int = 1024
    block_size: int = 16
    kv_cache_gib: float | None = None
    gpu_memory_utilization: float = 0.9
    cuda_graphs: bool = True
    async_scheduling: bool = True
    batch_invariant: bool = False
    threads: int | None = None
    step_timeout_s: float = 30.0
    shutdown_timeout_s: float = 10.0
    sim_step_ms: float = 10.0
    log_level: str = "info"


def parse_groups(text: str) -> tuple[int, ...]:
    """ "2x4" -> (4, 4); a mixture "1x4,2x2" -> (4, 2, 2).

    Raises OptionError with the form that is expected.
    """
    degrees: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", part)
        if not match or int(match[1]) < 1 or int(match[2]) < 1:
            raise OptionError(
                f"--groups {text!r}: expected GROUPSxTP such as 2x4 (two groups of four ranks), "
                "or a mixture such as 1x4,2x2"
            )
        degrees += [int(match[2])] * int(match[1])
    if len(degrees) > 64 or sum(degrees) > 256:
        raise OptionError(
            f"--groups {text!r} asks for {len(degrees)} groups with {sum(degrees)} ranks in all; "
            "at most 64 groups and 256 ranks fit a node"
        )
    return tuple(degrees)
