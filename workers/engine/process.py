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
from typing import TYPE_CHECKING

from ...ipc.actor import Actor
from ...ipc.config import ActorSpec
from ...ipc.plan import FLAG_STOP, PlanView, write_result
from ...ipc.ring import RingReader, RingTimeout, RingWriter
from ...ipc.rings import plan_ring, result_ring
from .sim import SimEngine
from .step import StepEngine

if TYPE_CHECKING:
    from ..parallel.communicator import Communicator
    from .loaded import LoadedModel

_IDLE_SLICE_S = 0.25


def main(actor: Actor, fds: Mapping[str, int], model: LoadedModel | None) -> None:
    """Runs the worker until it is asked to stop; model: None for the `sim` device."""
    spec = actor.spec
    plans = RingReader(
        plan_ring(spec.group, spec.engine),
        fds["plan.memory"],
        f"worker{spec.rank}",
        spin_us=spec.engine.spin_us,
    )
    results = _open_results(spec, fds)
    actor.phase("making the KV cache")
    engine = _create_engine(spec, fds, model)
    actor.phase("warming up")
    engine.warm_up()
    actor.ready()
    _serve(actor, engine, plans, results)


def _serve(actor: Actor, engine: StepEngine, plans: RingReader, results: RingWriter | None) -> None:
    """The main loop; leaves after the last plan, or when the actor is stopping."""
    flags = 0
    while not flags & FLAG_STOP:
        frame = plans.poll()
        idle = frame is None
        while frame is None:
            if actor.stopping.is_set():
                return
            frame = _wait_for_plan(plans)
        start_ns = time.perf_counter_ns()
        plan = PlanView(frame)
        step, flags = plan.step, plan.flags
        result = engine.step(plan, idle)
        plans.release()
        if results is not None:
            step_us = (time.perf_counter_ns() - start_ns) // 1000
            out = results.reserve(actor.spec.engine.step_timeout_s)
            results.publish(write_result(out, step, result.rows, step_us, result.forward_us))


def _wait_for_plan(plans: RingReader) -> memoryview | None:
    """The next plan, or None when there is none for a slice of time."""
    try:
        return plans.wait(_IDLE_SLICE_S)
    except RingTimeout:
        return None


def _open_results(spec: ActorSpec, fds: Mapping[str, int]) -> RingWriter | None:
    """Rank 0's end of the result ring."""
    if spec.rank != 0:
        return None
    events = (fds["result.event.scheduler"], fds["result.event.detokenizer"])
    return RingWriter(
        result_ring(spec.group, spec.engine), fds["result.memory"], events, spec.engine.spin_us
    )


def _create_engine(
    spec: ActorSpec, fds: Mapping[str, int], model: LoadedModel | None
) -> StepEngine:
    engine = spec.engine
    if model is None:
        return SimEngine(engine.max_num_seqs, spec.model.vocab_size, engine.sim_step_ms)
    # The `sim` device gets here without torch.
    import torch

    from .engine import Engine

    torch.set_num_threads(spec.threads)
    communicator = _create_communicator(spec, fds)
    return Engine(model.ranks[engine.tp][spec.rank], model.kernels, engine, communicator)


def _create_communicator(spec: ActorSpec, fds: Mapping[str, int]) -> Communicator:
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
