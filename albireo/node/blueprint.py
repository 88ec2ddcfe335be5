"""What a node is to become, decided once its model is known: the specs of all its actors."""

from __future__ import annotations

from albireo.ipc.config import (
    ActorSpec,
    EngineConfig,
    GatewayConfig,
    ListenConfig,
    TenantConfig,
)

from .core_plan import CorePlan, make_core_plan
from .fork_protocol import Load, Loaded
from .gpus import Gpu, visible_gpus
from .options import NodeOptions
from .placement import assign, nvml_distance
from .sizing import comm_bytes, size_engine


def what_to_load(options: NodeOptions, model_path: str, model_name: str) -> Load:
    """The fork server's order, from what the user asked for."""
    return Load(
        model_path=model_path,
        model_name=options.served_model_name or model_name,
        tokenizer_path=options.tokenizer or model_path,
        chat_template=options.chat_template,
        device=options.device,
        dtype=options.dtype,
        load_format=options.load_format,
        tp_degrees=tuple(sorted(set(options.groups))),
        batch_invariant=options.batch_invariant,
        sampling_defaults=options.sampling_defaults,
        gateways=options.num_gateways,
    )


class Blueprint:
    """Engine configuration of each group, the core plan, and every actor's spec.

    Raises OptionError, with the arithmetic, when a length or the cache does not fit.
    """

    def __init__(self, options: NodeOptions, load: Load, loaded: Loaded, runtime_dir: str) -> None:
        self._options = options
        self._runtime_dir = runtime_dir
        self._model = loaded.model
        self.cores: CorePlan = make_core_plan(
            options.groups, loaded.device, options.threads, gateways=options.num_gateways
        )
        self._gpus: list[tuple[Gpu, ...]] = [()] * len(options.groups)
        if loaded.device == "cuda":
            gpus = visible_gpus()
            self._gpus = assign(options.groups, gpus, nvml_distance(gpus))
        self.engines: list[EngineConfig] = [
            size_engine(
                options, load.model_path, loaded.device, loaded.dtype, loaded.model, tp,
                self.cores, gpus,
            )
            for tp, gpus in zip(options.groups, self._gpus, strict=True)
        ]  # fmt: skip

    def comm_bytes(self, group: int) -> int:
        """Shared memory for the collectives of a group's ranks; 0 where it needs none."""
        return comm_bytes(self.engines[group], self._model)

    def actor(
        self, role: str, name: str, incarnation: int, group: int = -1, rank: int = -1
    ) -> ActorSpec:
        return ActorSpec(
            role=role,
            name=name,
            node=self._options.name,
            incarnation=incarnation,
            runtime_dir=self._runtime_dir,
            threads=self.cores.worker_threads if role == "worker" else 1,
            log_level=self._options.log_level,
            model=self._model,
            engine=self.engines[max(group, 0)],
            group=group,
            rank=rank,
            num_groups=len(self.engines),
            loading_threads=self.cores.loading_threads if role == "worker" else 1,
            max_num_queued_reqs=self._options.max_num_queued_reqs,
            tenants=TenantConfig(
                max_num_reqs=self._options.max_num_reqs_per_tenant,
                max_num_tokens=self._options.max_num_tokens_per_tenant,
                weights=self._options.tenant_weights,
                isolated=self._options.isolate_tenants,
            ),
            max_failovers=self._options.max_failovers,
            gpus=tuple(gpu.uuid for gpu in self._gpus[group]) if role == "worker" else (),
            group_gpus=tuple(tuple(gpu.uuid for gpu in each) for each in self._gpus)
            if role == "router"
            else (),
            seed=self._options.seed if role == "router" else None,
            gateway=self._gateway() if role == "gateway" else None,
            listen=self._listen() if role == "router" else None,
            resume_s=self._options.resume_s,
            journal=self._options.journal or "",
            journal_bytes=self._options.journal_max_mib << 20,
            journal_sync_s=self._options.journal_fsync_s,
        )

    def _gateway(self) -> GatewayConfig:
        return GatewayConfig(
            api_key=self._options.api_key,
            api_key_file=self._options.api_key_file,
            allowed_origins=self._options.allowed_origins,
            stream_interval=self._options.stream_interval,
            ssl_certfile=self._options.ssl_certfile,
            ssl_keyfile=self._options.ssl_keyfile,
        )

    def _listen(self) -> ListenConfig | None:
        options = self._options
        if options.listen is None:
            return None
        assert options.tls_cert is not None and options.tls_key is not None
        return ListenConfig(
            tls_cert=options.tls_cert,
            tls_key=options.tls_key,
            api_key=options.api_key,
            api_key_file=options.api_key_file,
        )

    def facts(self) -> dict[str, object]:
        """What node.json and the ready line say of the decisions."""
        engine = self.engines[0]
        return {
            "device": engine.device,
            "dtype": engine.dtype,
            "core_plan": self.cores.describe(),
            "max_model_len": engine.max_model_len,
        }
