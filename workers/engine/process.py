"""A worker: one rank of a group, in a process of its own.

It reads plans from the group's plan ring and carries them out; rank 0 writes
the results to the result ring.  The plan is all that a rank acts on, so ranks
cannot diverge.  Waiting for a plan may take for ever (an idle group), so it is
done in slices between which a stop request is seen; a result that nobody takes
is a fault.  Whatever goes wrong in a step ends the process, and the supervisor
ends the group with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from ...ipc.actor import NUM_BLOCKS, SWAP_BLOCK_NS, Actor
from ...ipc.config import ActorSpec
from ...ipc.plan import FLAG_STOP, PlanView
from ...ipc.ring import RingReader, RingTimeout
from ...ipc.rings import plan_ring
from ...ipc.shared_memory import Spin
from .recorder import StepRecorder
from .results import ResultWriter
from .sim import SimEngine
from .step import StepEngine

if TYPE_CHECKING:
    from ..grammar.vocabulary import Vocabulary
    from ..models.config import ModelConfig
    from ..parallel.communicator import HostCommunicator
    from .loaded import LoadedModel

_IDLE_SLICE_S = 0.25


def main(
    actor: Actor,
    fds: Mapping[str, int],
    model: LoadedModel | ModelConfig | None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Runs the worker until it is asked to stop.

    model: what the fork server has of it; on `cuda` the config, on `sim` nothing.
    vocabulary: for grammars; on `sim` nothing.
    """
    spec = actor.spec
    ring = plan_ring(spec.group, spec.engine)
    plans = RingReader(
        ring,
        fds["plan.memory"],
        f"worker{spec.rank}",
        spin_us=round(spec.engine.awake_s * 1e6),
        at_once=ring.frames,
        spin=_spin(spec.engine.device),
    )
    results = ResultWriter(spec, fds)
    engine = _create_engine(actor, fds, model, vocabulary, results, plans.memory)
    actor.phase("warming up")
    found = engine.warm_up()
    details = {NUM_BLOCKS: found.num_blocks, SWAP_BLOCK_NS: found.swap_block_ns}
    actor.detail |= {name: value for name, value in details.items() if value}
    actor.ready()
    _serve(actor, engine, plans, results, StepRecorder(fds))


def _serve(
    actor: Actor,
    engine: StepEngine,
    plans: RingReader,
    results: ResultWriter,
    recorder: StepRecorder,
) -> None:
    """The main loop; leaves after the last plan, or when the actor is stopping."""
    flags = step = 0
    while not flags & FLAG_STOP:
        free_ns = time.monotonic_ns()
        frame = plans.poll()
        idle = spins = frame is None
        while frame is None:
            if actor.stopping.is_set():
                return
            actor.answer_ping(step)
            _release(plans, engine)
            frame, spins = _wait_for_plan(plans, spins), False
        start_ns = time.monotonic_ns()
        if idle:
            recorder.waited(free_ns, start_ns)
        plan = PlanView(frame)
        step, flags, words = plan.step, plan.flags, len(plan.words)
        result = engine.step(plan, idle)
        _release(plans, engine)
        end_ns = time.monotonic_ns()
        if result is None:
            recorder.launched(step, start_ns, end_ns, words)
        else:
            results.deliver(step, result, (end_ns - start_ns) // 1000)
            recorder.computed(step, start_ns, end_ns, result, words)
        actor.answer_ping(step)
    engine.finish()


def _release(plans: RingReader, engine: StepEngine) -> None:
    """Gives the frames back whose plans the engine has read."""
    if plans.held:
        for _ in range(plans.held - engine.plans_in_use()):
            plans.release()


def _spin(device: str) -> Spin | None:
    """Where another thread waits for the device, and hands out what it has computed."""
    if device != "cuda":
        return None
    from ..kernels.cpu.spin import spin_until

    return spin_until


def _wait_for_plan(plans: RingReader, spins: bool) -> memoryview | None:
    """The next plan, or None when there is none for a slice of time."""
    try:
        return plans.wait(_IDLE_SLICE_S, spins)
    except RingTimeout:
        return None


def _create_engine(
    actor: Actor,
    fds: Mapping[str, int],
    model: LoadedModel | ModelConfig | None,
    vocabulary: Vocabulary | None,
    results: ResultWriter,
    plan_memory: memoryview,
) -> StepEngine:
    spec, engine = actor.spec, actor.spec.engine
    if engine.device == "sim":
        return SimEngine(engine.num_slots, spec.model.vocab_size, engine.sim_step_ms)
    # The `sim` device gets here without torch.
    import torch

    torch.set_num_threads(spec.threads)
    if engine.device == "cuda":
        from .cuda.worker import create_engine

        return create_engine(
            actor, fds, cast("ModelConfig", model), vocabulary, results.deliver, plan_memory
        )
    from .engine import Engine

    loaded = cast("LoadedModel", model)
    actor.phase("making the KV cache")
    communicator = _create_communicator(spec, fds)
    return Engine(
        loaded.ranks[engine.tp][spec.rank], loaded.kernels, engine, communicator, vocabulary
    )


def _create_communicator(spec: ActorSpec, fds: Mapping[str, int]) -> HostCommunicator:
    """The ranks' collectives; a peer that is not there within a step's time is a fault."""
    from ..parallel.communicator import SingleRank
    from ..parallel.shared import SharedMemoryCommunicator, slab_bytes

    engine, model = spec.engine, spec.model
    if engine.tp == 1:
        return SingleRank()
    max_bytes = slab_bytes(
        engine.tp,
        engine.max_num_batched_tokens,
        model.hidden_size,
        engine.max_num_seqs,
        model.vocab_size,
    )
    return SharedMemoryCommunicator(
        fds["comm.memory"],
        spec.rank,
        engine.tp,
        max_bytes,
        engine.step_timeout_s,
        engine.spin_us,
    )
