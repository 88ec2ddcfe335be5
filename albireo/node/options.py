"""What the user asked for: the options of `albireo node start`, parsed and frozen."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

DEVICES = ("auto", "cpu", "cuda", "sim")
LOAD_FORMATS = ("auto", "dummy")
LOG_LEVELS = ("debug", "info", "warning", "error")
DTYPES = ("auto", "bfloat16", "float32")
RESUME_S = 10.0
SAMPLING_DEFAULTS = ("model", "openai")
SAMPLING_MODES = ("auto", "gather", "sequence", "vocab")
KV_CACHE_DTYPES = ("auto", "model", "e4m7")
E4M7_WEIGHTS = ("auto", "beside", "only", "off")


class OptionError(ValueError):
    """An option cannot be satisfied; the text says why and what would work."""


_MOST_COUNT = (1 << 31) - 1
_MOST_STEP_TOKENS = 1 << 17
"""A launch has 65,535 tiles of prompts' rows at most, of four tokens where 16 heads share keys."""
_AtLeast1 = Annotated[int, msgspec.Meta(ge=1, le=_MOST_COUNT)]
_AtLeast0 = Annotated[int, msgspec.Meta(ge=0, le=_MOST_COUNT)]
_Seed = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_MOST = 1e9  # of seconds and GiB; inf would not come through JSON, by which a node is told
_Amount = Annotated[float, msgspec.Meta(ge=0, le=_MOST)]
_Positive = Annotated[float, msgspec.Meta(gt=0, le=_MOST)]
MOST_SEQS = 4096
_MOST_GROUPS, _MOST_RANKS = 64, 256
WEIGHTS = (0.001, 1000.0)
_Weight = Annotated[float, msgspec.Meta(ge=WEIGHTS[0], le=WEIGHTS[1])]


def _one_of(words: tuple[str, ...]) -> msgspec.Meta:
    return msgspec.Meta(pattern=f"^({'|'.join(words)})$")


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `albireo node start`; None = decided from the model and the machine.

    groups: TP degree of each group, e.g. (4, 4) for "2x4".
    kv_cache_gib: memory for the KV cache of one group.
    gpu_memory_utilization: share of a GPU's free memory that its worker may take.
    tenant_weights: what the turns of some tenants weigh; those of all others weigh 1.
    isolate_tenants: none of them finds another one's prompts in the prefix cache.
    swap_space_gib: host memory of one group for the KV cache of preempted sequences.
    itl_target_ms: what a step with prefill in it should take at most; 0 = no target.
    mixed_step_tokens: of a step that computes prompts beside few decodes; 0 = as of any step.
    resume_grace_s: how long requests wait for a client whose connection is over; None = 10 with a
        journal, else 0: they end with the connection.
    journal: directory of the log from which requests go on after the router's death.
    journal_fsync_s: how often the disk has to have everything; 0 = when the kernel likes.
    http, uds: "HOST:PORT" and the path of a Unix socket on which `gateways` processes serve HTTP.
    api_key, api_key_file, allowed_origins, stream_interval, ssl_certfile, ssl_keyfile: as in
        ipc/config.GatewayConfig.
    seed: what the seeds of requests without one are drawn from; None = chance.
    listen: "HOST:PORT" for clients of the library over TCP, with tls_cert and tls_key (PEM files).

    Ranges are checked where options are decoded or converted, not where they are constructed.
    """

    name: str = "default"
    model: str = "demo"
    served_model_name: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    groups: Annotated[
        tuple[_AtLeast1, ...], msgspec.Meta(min_length=1, max_length=_MOST_GROUPS)
    ] = (1,)
    device: Annotated[str, _one_of(DEVICES)] = "auto"
    dtype: Annotated[str, _one_of(DTYPES)] = "auto"
    load_format: Annotated[str, _one_of(LOAD_FORMATS)] = "auto"
    max_model_len: Annotated[int, msgspec.Meta(ge=2, le=_MOST_COUNT)] | None = None
    max_num_seqs: Annotated[int, msgspec.Meta(ge=1, le=MOST_SEQS)] = 256
    max_num_batched_tokens: Annotated[int, msgspec.Meta(ge=1, le=_MOST_STEP_TOKENS)] | None = None
    max_num_queued_reqs: _AtLeast0 = 1024
    max_num_reqs_per_tenant: _AtLeast0 = 0
    tenant_weights: dict[str, _Weight] = {}
    isolate_tenants: bool = False
    max_num_tokens_per_tenant: _AtLeast0 = 0
    max_failovers: _AtLeast0 = 3
    resume_grace_s: _Amount | None = None
    journal: str | None = None
    journal_max_mib: Annotated[int, msgspec.Meta(ge=16, le=1 << 20)] = 256
    journal_fsync_s: _Amount = 0.0
    block_size: Annotated[int, msgspec.Meta(ge=16, le=16)] = 16
    kv_cache_gib: _Positive | None = None
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    enable_prefix_caching: bool = True
    swap_space_gib: _Amount = 0.0
    itl_target_ms: _Amount = 0.0
    mixed_step_tokens: Annotated[int, msgspec.Meta(ge=0, le=_MOST_STEP_TOKENS)] | None = None
    cuda_graphs: bool = True
    async_scheduling: bool = True
    async_output: bool = True
    sampling_defaults: Annotated[str, _one_of(SAMPLING_DEFAULTS)] = "model"
    sampling_mode: Annotated[str, _one_of(SAMPLING_MODES)] = "auto"
    batch_invariant: bool = False
    e4m7_weights: Annotated[str, _one_of(E4M7_WEIGHTS)] = "auto"
    kv_cache_dtype: Annotated[str, _one_of(KV_CACHE_DTYPES)] = "auto"
    threads: Annotated[int, msgspec.Meta(ge=1, le=512)] | None = None
    step_timeout_s: _Positive = 30.0
    start_timeout_s: _Positive = 600.0
    max_group_restarts: _AtLeast0 = 12
    shutdown_timeout_s: _Amount = 10.0
    sim_step_ms: _Positive = 10.0
    log_level: Annotated[str, _one_of(LOG_LEVELS)] = "info"
    http: str | None = None
    uds: str | None = None
    gateways: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    api_key: str | None = None
    api_key_file: str | None = None
    allowed_origins: tuple[str, ...] = ()
    stream_interval: _AtLeast1 = 1
    seed: _Seed | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    listen: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    @property
    def resume_s(self) -> float:
        """The grace time, decided."""
        if self.resume_grace_s is not None:
            return self.resume_grace_s
        return 0.0 if self.journal is None else RESUME_S

    def check(self) -> None:
        """Raises OptionError when two options contradict each other, whatever the model is."""
        if self.journal is not None and not self.resume_s:
            raise OptionError(
                "--resume-grace 0 gives no client the time to come back, so --journal is of no "
                "use: leave one of them out"
            )
        batched = self.max_num_batched_tokens
        if batched is not None and batched < self.max_num_seqs:
            raise OptionError(
                f"--max-num-batched-tokens {batched} is less than --max-num-seqs "
                f"{self.max_num_seqs}: every running sequence needs a token in each step"
            )

    @property
    def num_gateways(self) -> int:
        """Gateway processes that run: none unless HTTP is asked for."""
        return self.gateways if self.http is not None or self.uds is not None else 0


def parse_weights(text: str) -> dict[str, float]:
    """ "alice=4,batch=0.5" -> {"alice": 4.0, "batch": 0.5}.  Raises OptionError."""
    weights: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, value = part.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = 0.0
        low, high = WEIGHTS
        if not name or not low <= weight <= high:
            raise OptionError(
                f"--tenant-weights: {part!r} is not TENANT=WEIGHT with a weight of {low:g} to "
                f"{high:g}, such as alice=4"
            )
        if name in weights:
            raise OptionError(f"--tenant-weights: {name!r} is there twice")
        weights[name] = weight
    return weights


def parse_groups(text: str) -> tuple[int, ...]:
    """ "2x4" -> (4, 4); a mixture "1x4,2x2" -> (4, 2, 2).

    Raises OptionError with the form that is expected.
    """
    counts: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", part)
        if not match or int(match[1]) < 1 or int(match[2]) < 1:
            raise OptionError(
                f"--groups {text!r}: expected GROUPSxTP such as 2x4 (two groups of four ranks), "
                "or a mixture such as 1x4,2x2"
            )
        counts.append((int(match[1]), int(match[2])))
    groups = sum(count for count, _ in counts)
    ranks = sum(count * degree for count, degree in counts)
    if groups > _MOST_GROUPS or ranks > _MOST_RANKS:
        raise OptionError(
            f"--groups {text!r} asks for {groups} groups with {ranks} ranks in all; "
            f"at most {_MOST_GROUPS} groups and {_MOST_RANKS} ranks fit a node"
        )
    return tuple(degree for count, degree in counts for _ in range(count))
