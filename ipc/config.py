"""Frozen configuration, made once by the supervisor and handed to every actor.

ModelInfo is what the model's files say, EngineConfig what one group runs with,
everything decided, ActorSpec what one process is started with.  (What the user
asked for are NodeOptions, node/options.py.)
"""

from __future__ import annotations

import msgspec

from .params import SamplingDefaults

SPARE_SLOTS = 16
"""A slot is free only when the last step that names it has its result.  With these, whoever
comes next need not wait for that."""

LOOKAHEAD = 2
"""With asynchronous scheduling; see EngineConfig."""

AWAKE_S = 0.01
"""So long who waits for a step polls behind the last one, instead of sleeping.  Longer steps gain
next to nothing from it."""


def blocks_for(positions: int, block_size: int) -> int:
    """KV blocks that hold so many positions."""
    return -(-positions // block_size)


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of a loaded model that actors without torch need.

    eos_token_ids: the model's own end tokens (generation config included).
    kv_bytes_per_token: keys and values of one token over all layers and heads.
    kv_step_bytes_per_token: beside them, what a step makes of a token that it keeps no longer.
    kv_layers: that keep keys and values.
    head_dim: of its attention.
    tp_degrees: the degrees of tensor parallelism its shapes divide by.
    activation_bytes_per_token: most that a token needs at once within a forward pass.
    loaded_bytes: of the weights as layers keep them: a tied LM head is a table of its own.
    e4m7_params: of them those that can have 12 bits, by the degree of tensor parallelism.
    layer_products: multiplications for a token in the linear layers of a layer, on average.
    rope_bytes: of the rotary tables, which every rank has whole.
    strips_first_space, special_ids: its tokenizer's, as in workers/tokenizer/text_model.py.
    tool_style: the form of its tool calls, "hermes" or "llama".
    sampling_defaults: of its generation_config.json.
    """

    name: str
    architecture: str
    vocab_size: int
    context_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    hidden_size: int
    num_params: int
    weight_bytes: int
    kv_bytes_per_token: int
    tp_degrees: tuple[int, ...]
    kv_step_bytes_per_token: int = 0
    kv_layers: int = 1
    head_dim: int = 0
    activation_bytes_per_token: int = 0
    loaded_bytes: int = 0
    e4m7_params: dict[int, int] = {}
    layer_products: int = 1
    rope_bytes: int = 0
    strips_first_space: bool = False
    special_ids: tuple[int, ...] = ()
    tool_style: str = "hermes"
    sampling_defaults: SamplingDefaults = SamplingDefaults()

    @property
    def kv_room_per_token(self) -> int:
        """Bytes on the device, of all ranks."""
        return self.kv_bytes_per_token + self.kv_step_bytes_per_token


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the actors of one group agree on.

    lookahead: plans that may be in the ring beyond the running one: 0 without asynchronous
        scheduling, else LOOKAHEAD, of which more than one only while steps are very short
        (scheduler.py).
    num_blocks: KV blocks of `block_size` tokens on every rank.  Workers on a GPU are told how many
        can be of use, and find out how many there is memory for; the others are told that.
    step_timeout_s: a step that takes longer is a fault.
    sim_step_ms: step time of the `sim` device.
    cuda_graphs: steps on a GPU run as captured graphs, but for large prefills.
    sampling_mode: "gather", "sequence", "vocab", or "auto" for the fastest that fits a step.
    async_output: text is made while the next step runs; else the next plan waits for it.
    prefix_caching: prompts share the KV blocks of their common prefixes.
    e4m7_weights: of linear layers, on a Hopper GPU: 12 bits "beside" bfloat16, "only", or "off".
    kv_cache_dtype: "model" for `dtype`, or "e4m7", 12 bits a number, on a GPU.
    num_swap_blocks: blocks of host memory for preempted sequences, on every rank.
    itl_target_ms: prefill chunks are sized so that a step stays below it; 0 = no target.
    mixed_step_tokens: of a step that computes prompts beside few decodes; 0 = as of any step.
    gpu_memory_utilization: of what is free when a worker starts, what it may take; its KV cache
        gets what the rest of it leaves.  0 = the KV cache has num_blocks.
    swap_block_ns: what a worker measured for the copy of a KV block to host memory, or back; 0
        where there is no swap space, and before it is known.
    """

    model_path: str
    device: str
    dtype: str
    load_format: str
    tp: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    lookahead: int
    batch_invariant: bool
    step_timeout_s: float
    spin_us: int
    sim_step_ms: float
    cuda_graphs: bool = True
    sampling_mode: str = "auto"
    async_output: bool = True
    prefix_caching: bool = True
    e4m7_weights: str = "off"
    kv_cache_dtype: str = "model"
    num_swap_blocks: int = 0
    itl_target_ms: float = 0.0
    mixed_step_tokens: int = 0
    gpu_memory_utilization: float = 0.0
    swap_block_ns: int = 0

    @property
    def blocks_of_longest(self) -> int:
        """KV blocks of one request of max_model_len."""
        return blocks_for(self.max_model_len, self.block_size)

    @property
    def awake_s(self) -> float:
        """AWAKE_S, or 0 where cores are few."""
        return AWAKE_S if self.spin_us else 0.0

    @property
    def num_slots(self) -> int:
        """Rows of the tables by slot: max_num_seqs run, the spare ones wait for their last step."""
        return self.max_num_seqs + SPARE_SLOTS


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an HTTP gateway is told.

    api_key, api_key_file: clients must give one of these keys; neither = no key is asked for.
    allowed_origins: web pages that may ask; () = none (no CORS).
    stream_interval: tokens of an answer's event, but its first.
    ssl_certfile, ssl_keyfile: PEM files; with them its TCP port speaks HTTPS.
    """

    api_key: str | None = None
    api_key_file: str | None = None
    allowed_origins: tuple[str, ...] = ()
    stream_interval: int = 1
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None


class TenantConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the node treats those who share it: clients by the tenant they name, API keys by theirs.

    max_num_reqs: answers in flight of one, running or queued; 0 = any number.
    max_num_tokens: of their prompts and what they may get; 0 = any number.
    weights: of the turns of some; all others have 1.
    isolated: no tenant finds another one's prompts in the prefix cache.
    """

    max_num_reqs: int = 0
    max_num_tokens: int = 0
    weights: dict[str, float] = {}
    isolated: bool = False


class ListenConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the router is told of its clients over TCP.

    tls_cert, tls_key: PEM files.  api_key, api_key_file: as in GatewayConfig; one at least is set.
    """

    tls_cert: str
    tls_key: str
    api_key: str | None = None
    api_key_file: str | None = None


class ActorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one process is started with.

    role: "router", "tokenizer", "gateway", "scheduler", "worker" or "detokenizer".
    name: unique in the node, e.g. "router", "g0.scheduler", "g1.worker2".
    group, rank: -1 where they have no meaning.
    engine: of the actor's group; for router and tokenizer, of group 0.
    loading_threads: of a GPU's worker while it loads its weights; `threads` otherwise.
    gpus: of the actor's group, by rank, as CUDA_VISIBLE_DEVICES names them.
    group_gpus: for the router, those of each group.
    seed: for the router, what the seeds of requests without one are drawn from; None = chance.
    gateway: of the role "gateway" alone.  listen: of the router alone, where it serves TCP.
    resume_s: so long the router keeps the requests of a client whose connection is over; 0 = not.
    journal, journal_bytes, journal_sync_s: its directory ("" = none), size of all its files, and
        how often the disk has to have everything (0 = when the kernel likes).
    """

    role: str
    name: str
    node: str
    incarnation: int
    runtime_dir: str
    threads: int
    log_level: str
    model: ModelInfo
    engine: EngineConfig
    group: int = -1
    rank: int = -1
    num_groups: int = 1
    loading_threads: int = 1
    max_num_queued_reqs: int = 0
    tenants: TenantConfig = TenantConfig()
    max_failovers: int = 0
    chat_template: str | None = None
    tokenizer_path: str = ""
    gpus: tuple[str, ...] = ()
    group_gpus: tuple[tuple[str, ...], ...] = ()
    seed: int | None = None
    gateway: GatewayConfig | None = None
    listen: ListenConfig | None = None
    resume_s: float = 0.0
    journal: str = ""
    journal_bytes: int = 0
    journal_sync_s: float = 0.0

    def socket_path(self, link: str) -> str:
        """Path of the ZeroMQ socket of a link: "router" or "g<group>"."""
        return f"{self.runtime_dir}/{link}.zmq"
