"""The GPU engine in this process, one part after the other, each with a line that says how it went.

    python3 tools/gpu_smoke.py [--shape qwen3-0.6b] [--batch 1,64]

For a machine on which the engine runs for the first time: it stops at the first
part that fails, with the traceback, and needs neither pytest nor a node.  With
CUDA_LAUNCH_BLOCKING=1 a fault is reported where it happens.  First a tiny model
in float32, whose tokens have to be those of the CPU's engine, launch by launch
and in graphs; then the time of a decode step of a real shape, without anything
around it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch

from albireo.bench.shapes import SHAPES, write_model
from albireo.ipc.config import ActorSpec, EngineConfig, ModelInfo
from albireo.ipc.plan import TAKE_WORDS, PlanSections, PlanView, plan_bytes, write_plan
from albireo.workers.models.config import ModelConfig
from albireo.workers.models.load import load_model, read_config

_PROMPT_LEN = 256
_EMPTY = np.zeros(0, np.int32)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    print(f"... {name}", flush=True)
    began = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    print(f" ok {name}: {time.perf_counter() - began:.2f} s", flush=True)


class Sequences:
    """Plans for `count` sequences in slots 0 .. count-1: their prompts, then decodes."""

    def __init__(self, engine: EngineConfig, count: int, length: int, temperature: float) -> None:
        self._engine = engine
        self._slots = np.arange(count, dtype=np.int32)
        self._length = length
        self._temperature = temperature
        self._cached = 0

    def prefills(self, vocab: int) -> list[PlanView]:
        """One prompt after the other, whole."""
        rng = np.random.default_rng(0)
        plans = []
        for slot in self._slots.tolist():
            take = np.zeros((1, TAKE_WORDS), np.int32)
            floats = np.array([self._temperature, 0.95, 0.02], np.float32)
            heat, nucleus, least = floats.view(np.int32)
            take[0, :10] = (slot, slot + 1, slot, 0, heat, 50, nucleus, least, self._length, 0)
            append = self._blocks([slot], 0, self._length)
            chunk = np.array([[slot, 0, self._length, 1]], np.int32)
            tokens = rng.integers(0, vocab, self._length).astype(np.int32)
            plans.append(self._plan(take, append, chunk, tokens, _EMPTY))
        self._cached = self._length
        return plans

    def decode(self) -> PlanView:
        """All sequences go on by one token."""
        append = self._blocks(self._slots.tolist(), self._cached, self._cached + 1)
        self._cached += 1
        return self._plan(
            _EMPTY.reshape(0, TAKE_WORDS), append, _EMPTY.reshape(0, 4), _EMPTY, self._slots
        )

    def _blocks(self, slots: list[int], start: int, end: int) -> np.ndarray:
        size = self._engine.block_size
        each = -(-self._engine.max_model_len // size)
        new = range(-(-start // size), -(-end // size))
        rows = [(slot, index, slot * each + index) for slot in slots for index in new]
        return np.array(rows, np.int32).reshape(-1, 3)

    def _plan(self, *sections: np.ndarray) -> PlanView:
        engine = self._engine
        nbytes = plan_bytes(
            engine.max_num_seqs, engine.max_num_batched_tokens, engine.block_size,
            engine.max_model_len,
        )  # fmt: skip
        frame = memoryview(bytearray(nbytes))
        write_plan(frame, 1, 0, PlanSections(*sections))
        return PlanView(frame)


def engine_config(device: str, dtype: str, path: str, seqs: int, length: int) -> EngineConfig:
    return EngineConfig(
        model_path=path, device=device, dtype=dtype, load_format="dummy", tp=1,
        max_model_len=length, block_size=16, num_blocks=seqs * -(-length // 16), max_num_seqs=seqs,
        max_num_batched_tokens=max(512, seqs), lookahead=1, batch_invariant=False,
        step_timeout_s=60.0, spin_us=0, sim_step_ms=0.0,
    )  # fmt: skip


class GpuRun:
    """A CudaEngine as a worker makes it, and its results."""

    def __init__(self, engine: EngineConfig, config: ModelConfig) -> None:
        from albireo.workers.engine.cuda.worker import create_engine

        info = ModelInfo(
            name="", architecture="", vocab_size=config.vocab_size, context_len=config.context_len,
            eos_token_ids=(), bos_token_id=None, hidden_size=config.hidden_size, num_params=0,
            weight_bytes=0, kv_bytes_per_token=0, tp_degrees=(1,),
        )  # fmt: skip
        spec = ActorSpec(
            role="worker", name="g0.worker0", node="smoke", incarnation=0, runtime_dir="",
            threads=1, log_level="info", model=info, engine=engine, group=0, rank=0,
        )  # fmt: skip
        self.times: list[tuple[int, int]] = []
        self._rows: list[list[list[int]]] = []
        self._more = threading.Semaphore(0)
        self._failure = ""
        actor: Any = SimpleNamespace(spec=spec, phase=print, fatal=self._fail)
        self.engine = create_engine(actor, {}, config, self._deliver)

    def _deliver(self, step: int, result: Any, step_us: int) -> None:
        self._rows.append(result.rows.tolist())
        self.times.append((step_us, result.forward_us))
        self._more.release()

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._more.release()

    def run(self, plans: list[PlanView]) -> list[list[list[int]]]:
        """Rows of each plan; two are under way at a time, as in a node."""
        self._rows = []
        for number, plan in enumerate(plans):
            self.engine.step(plan, False)
            if number:
                self._wait()
        self._wait()
        return self._rows

    def _wait(self) -> None:
        assert self._more.acquire(timeout=120), "no result within 120 s"
        if self._failure:
            raise RuntimeError(self._failure)


def check_tables() -> None:
    """The kernels around the forward pass alone, synchronised one by one."""
    from albireo.workers.engine.cuda import apply_plan
    from albireo.workers.engine.cuda.slot_tables import SlotTables

    tables = SlotTables(8, 4, 64, 16, 99, torch.device("cuda"))
    sequences = Sequences(engine_config("cuda", "float32", "", 8, 64), 2, 20, 0.5)
    for name, run in (
        ("apply", lambda: apply_plan.apply(tables)),
        ("gather_chunks", lambda: apply_plan.gather_chunks(tables, 1)),
        ("advance", lambda: apply_plan.advance(tables, 1, 1)),
    ):
        if name == "apply":
            words = sequences.prefills(100)[1].words
            tables.words[: len(words)].copy_(torch.from_numpy(words.copy()))
        run()
        torch.cuda.synchronize()
        print(f"    {name} ran")
    assert tables.position[1].item() == 20 and tables.positions[:20].tolist() == list(range(20))
    assert tables.kv_index[17].item() == 5 * 16 + 1
    words = sequences.decode().words
    tables.words[: len(words)].copy_(torch.from_numpy(words.copy()))
    apply_plan.apply(tables)
    apply_plan.gather_decodes(tables, 4)
    torch.cuda.synchronize()
    assert tables.slots[:4].tolist() == [0, 1, 8, 8]
    assert tables.kv_index[2:4].tolist() == [99 * 16] * 2


def compare_tiny(path: Path) -> None:
    """Greedy and sampled tokens of the tiny shape: CPU, launch by launch, graphs."""
    from albireo.workers.engine.engine import Engine
    from albireo.workers.kernels import create
    from albireo.workers.parallel.communicator import SingleRank

    config = read_config(path)
    cpu = engine_config("cpu", "float32", str(path), 12, 96)
    kernels = create("cpu", torch.float32, False)
    (model,) = load_model(path, config, torch.float32, "dummy", 1, kernels, print)

    def plans(temperature: float) -> list[PlanView]:
        sequences = Sequences(cpu, 5, 37, temperature)
        return [*sequences.prefills(config.vocab_size), *(sequences.decode() for _ in range(20))]

    expected = {}
    for heat in (0.0, 0.8):
        reference = Engine(model, kernels, cpu, SingleRank())
        expected[heat] = [reference.step(plan, False).rows.tolist() for plan in plans(heat)]
    for graphs in (False, True):
        name = "graphs" if graphs else "launch by launch"
        with part(f"engine of the tiny shape, {name}: load"):
            engine = msgspec.structs.replace(cpu, device="cuda", cuda_graphs=graphs)
            run = GpuRun(engine, config)
        with part(f"warm-up, {name}"):
            run.engine.warm_up()
        for heat in (0.0, 0.8):
            with part(f"tokens at temperature {heat:g}, {name}"):
                found = run.run(plans(heat))
                for step, rows in enumerate(expected[heat]):
                    assert found[step] == rows, f"step {step}: {found[step]} in place of {rows}"
        run.engine.finish()


def time_shape(shape: str, path: Path, batches: list[int]) -> None:
    """GPU times of decode steps, as the engine's events measure them."""
    config = read_config(path)
    most = max(batches)
    engine = engine_config("cuda", "bfloat16", str(path), most, _PROMPT_LEN + 128)
    with part(f"{shape}: load"):
        run = GpuRun(engine, config)
    with part(f"{shape}: worst steps and graphs"):
        run.engine.warm_up()
    for heat in (0.0, 0.8):
        for batch in batches:
            sequences = Sequences(engine, batch, _PROMPT_LEN, heat)
            run.run(sequences.prefills(config.vocab_size))
            run.times.clear()
            began = time.perf_counter()
            run.run([sequences.decode() for _ in range(64)])
            wall_ms = (time.perf_counter() - began) / 64 * 1e3
            step, forward = (statistics.median(t[i] for t in run.times) / 1e3 for i in (0, 1))
            print(
                f"    {'full' if heat else 'greedy':6} batch {batch:4}: step {step:.3f} ms, "
                f"forward {forward:.3f} ms on the GPU; {wall_ms:.3f} ms a step by the clock",
                flush=True,
            )
    run.engine.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--batch", default="1,64,256")
    given = parser.parse_args()
    import triton

    print(f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}")
    with part("a CUDA context"):
        free, total = torch.cuda.mem_get_info()
    print(f"    {torch.cuda.get_device_name()}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    with part("the slot tables' kernels"):
        check_tables()
    with tempfile.TemporaryDirectory() as folder:
        for shape in ("tiny", given.shape):
            (Path(folder) / shape).mkdir(exist_ok=True)
            write_model(shape, Path(folder) / shape)
        compare_tiny(Path(folder) / "tiny")
        batches = [int(batch) for batch in given.batch.split(",")]
        time_shape(given.shape, Path(folder) / given.shape, batches)
    print("all parts ran")


if __name__ == "__main__":
    main()
