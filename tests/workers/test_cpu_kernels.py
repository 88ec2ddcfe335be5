"""The CPU kernels but attention: against float64, and the same bits for any batch."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch.nn import functional as F

from albireo.workers.kernels import create
from albireo.workers.kernels.cpu import products, simd, threads
from albireo.workers.kernels.cpu.threads import Parameters, Team
from albireo.workers.kernels.interface import Kernels

from .mixture_check import MixtureCheck
from .paged import ints

DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"], scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    made = create("cpu", request.param, True)
    made.set_threads(1)
    return made


def close(got: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """Within the rounding of the result's dtype, for values of about `scale`."""
    relative = 1e-5 if got.dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got.double(), expected, rtol=relative, atol=relative * scale)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 200),
    k=st.integers(1, 90).map(lambda half: 2 * half),
    rows=st.integers(1, 70),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear(kernels: Kernels, n: int, k: int, rows: int, with_bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    dtype = kernels.dtype
    weight, x = torch.randn(n, k).to(dtype), torch.randn(rows, k).to(dtype)
    bias = torch.randn(n).to(dtype) if with_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    packed = kernels.pack_linear(weight, bias)
    weight.fill_(float("nan"))  # packing is a copy
    y = kernels.linear(x, packed)
    assert y.shape == (rows, n)
    assert y.dtype == dtype
    close(y, expected, scale=k**0.5)
    for row in range(0, rows, 7):
        assert torch.equal(kernels.linear(x[row : row + 1], packed)[0], y[row])
    some = torch.randperm(rows)[: max(1, rows // 2)]
    assert torch.equal(kernels.linear(x[some], packed), y[some])


def test_linear_to_float32() -> None:
    torch.manual_seed(0)
    k = create("cpu", torch.bfloat16, False)
    weight, x = torch.randn(100, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    y = k.linear(x, k.pack_linear(weight, None, torch.float32))
    assert y.dtype == torch.float32
    close(y, x.double() @ weight.double().T, scale=8)


def test_linear_refuses_what_it_would_misread(kernels: Kernels) -> None:
    packed = kernels.pack_linear(torch.zeros(8, 16, dtype=kernels.dtype), None)
    with pytest.raises(ValueError, match="rows of 16"):
        kernels.linear(torch.zeros(2, 18, dtype=kernels.dtype), packed)
    with pytest.raises(ValueError, match="rows of 16"):
        kernels.linear(torch.zeros(2, 16, dtype=torch.float64), packed)
    with pytest.raises(ValueError, match="rows of 16"):
        kernels.linear(torch.zeros(16, 2, dtype=kernels.dtype).T, packed)


@pytest.mark.parametrize("hidden", [1, 16, 50, 576, 1027])
def test_rms_norm(kernels: Kernels, hidden: int) -> None:
    torch.manual_seed(hidden)
    x = (2 * torch.randn(9, hidden)).to(kernels.dtype)
    weight = torch.rand(hidden)

    def norm(rows: torch.Tensor) -> torch.Tensor:
        mean = rows.double().square().mean(-1, keepdim=True)
        return rows.double() * (mean + EPS).rsqrt() * weight.double()

    close(kernels.rms_norm(x, weight, EPS), norm(x))
    residual = torch.randn(9, hidden).to(kernels.dtype)
    total = (x.double() + residual.double()).to(kernels.dtype)
    got = kernels.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    close(got, norm(total))
    assert torch.equal(kernels.rms_norm(total[3:4], weight, EPS)[0], got[3])
    inner = torch.rand(hidden) - 0.5
    total = residual + kernels.rms_norm(x, inner, EPS)
    assert torch.equal(
        kernels.add_rms_norm(x, residual, weight, EPS, inner), kernels.rms_norm(total, weight, EPS)
    )
    assert torch.equal(residual, total)


@pytest.mark.parametrize("width", [1, 16, 100, 1536])
def test_activations(kernels: Kernels, width: int) -> None:
    torch.manual_seed(width)
    gate_up = (8 * torch.randn(7, 2 * width)).to(kernels.dtype)
    gate, up = gate_up.double().split(width, -1)
    for apply, expected in (
        (kernels.silu_mul, F.silu(gate) * up),
        (kernels.gelu_mul, F.gelu(gate, approximate="tanh") * up),
    ):
        got = apply(gate_up)
        close(got, expected)
        assert torch.equal(apply(gate_up[2:3])[0], got[2])


def test_gated_linear(kernels: Kernels) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 64).to(kernels.dtype)
    packed = kernels.pack_linear(torch.randn(40, 64).to(kernels.dtype), None)
    y = kernels.linear(x, packed)
    assert torch.equal(kernels.gated_linear(x, packed, "silu"), kernels.silu_mul(y))
    assert torch.equal(kernels.gated_linear(x, packed, "gelu"), kernels.gelu_mul(y))


@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
def test_activations_of_extremes(kernels: Kernels, name: str) -> None:
    gate = torch.tensor([-float("inf"), -200.0, -88.0, 0.0, 200.0, float("inf"), float("nan")])
    gate_up = torch.cat([gate, torch.ones(7)])[None].to(kernels.dtype)
    got = getattr(kernels, name)(gate_up)[0]
    assert got[0].isnan()  # -inf x 0, as in PyTorch
    assert got[1:4].abs().max() < 1e-30
    assert got[4] == 200
    assert got[5] == float("inf")
    assert got[6].isnan()


def test_embed(kernels: Kernels) -> None:
    table = torch.randn(10, 24).to(kernels.dtype)
    got = kernels.embed(ints([100, 109, 99, 110, 0, 105]), table, 100)
    expected = torch.zeros(6, 24, dtype=kernels.dtype)
    expected[[0, 1, 5]] = table[[0, 9, 5]]
    assert torch.equal(got, expected)


def test_threads_do_not_change_rows(kernels: Kernels) -> None:
    torch.manual_seed(0)
    team = create("cpu", kernels.dtype, False)
    team.set_threads(3)
    x = torch.randn(300, 256).to(kernels.dtype)
    weight = torch.randn(256)
    packed = kernels.pack_linear(torch.randn(200, 256).to(kernels.dtype), None)
    for _ in range(20):
        assert torch.equal(kernels.linear(x, packed), team.linear(x, packed))
        assert torch.equal(kernels.silu_mul(x), team.silu_mul(x))
        assert torch.equal(kernels.rms_norm(x, weight, EPS), team.rms_norm(x, weight, EPS))
    team.set_threads(1)


def test_a_forked_child_computes_the_same(kernels: Kernels) -> None:
    """Also when the parent has helper threads: the child makes its own."""
    torch.manual_seed(0)
    parent = create("cpu", kernels.dtype, False)
    parent.warm_up()
    parent.set_threads(2)
    x = torch.randn(200, 128).to(kernels.dtype)
    packed = parent.pack_linear(torch.randn(128, 128).to(kernels.dtype), None, torch.float32)
    expected = parent.linear(x, packed).numpy().tobytes()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(2)
            same = all(parent.linear(x, packed).numpy().tobytes() == expected for _ in range(50))
            os.write(writer, b"same" if same else b"different")
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as answer:
        assert answer.read() == b"same"
    assert os.waitpid(child, 0)[1] == 0
    parent.set_threads(1)


def test_warm_up_starts_no_threads(kernels: Kernels) -> None:
    before = set(os.listdir("/proc/self/task"))
    fresh = create("cpu", kernels.dtype, True)
    fresh.warm_up()
    fresh.pack_linear(torch.zeros(64, 64, dtype=kernels.dtype), None)
    assert set(os.listdir("/proc/self/task")) == before


def test_every_item_runs_once() -> None:
    """A launch returns when all items are done; helpers that wake late do no harm."""
    from albireo.workers.kernels.cpu.embedding import embed_item

    team = Team(4)
    layout = Parameters("7q")
    table, out = np.arange(64, dtype=np.uint16), np.zeros(64, np.uint16)
    tokens = np.zeros(1, np.int32)
    for value in range(2000):
        table[:] = value
        addresses = (tokens.ctypes.data, table.ctypes.data, out.ctypes.data)
        team.launch(embed_item, 3, True, layout, *addresses, 1, 64, 0, 1)
        assert (out == value).all()
    team.close()
    team.launch(embed_item, 3, True, layout, *addresses, 1, 64, 0, 1)


def test_helpers_spin_only_where_each_thread_has_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cgroup's quota counts: a helper that spins takes the time of those who work."""
    for cores, rounds in ((4, threads._SPIN_ROUNDS), (3, 0)):
        monkeypatch.setattr(threads, "usable_cores", lambda cores=cores: cores)
        team = Team(4)
        place = team._team + threads._SPIN - team._memory.ctypes.data
        assert team._memory[place : place + 8].view(np.int64)[0] == rounds


def test_pairs_without_the_bf16_instruction() -> None:
    """The widened product, which machines without avx512_bf16 use."""
    product = products._product("widened", products._multiply_pairs_widened, products.WIDE, False)

    @njit
    def run(a, b, table, init, c, rows, steps):  # type: ignore[no-untyped-def]
        simd.store_i64(table, b)
        product(rows, a, steps * 4, table, table, 1, steps, 256, init, 0, c, 256)

    torch.manual_seed(0)
    rows, k = min(3, products.MAX_ROWS), 20
    a, b = torch.randn(rows, k).bfloat16(), torch.randn(64, k).bfloat16()
    panel = b.view(64, k // 2, 2).transpose(0, 1).contiguous()
    c, init, table = torch.empty(rows, 64), torch.randn(64), torch.zeros(4, dtype=torch.int64)
    run(*(t.data_ptr() for t in (a, panel, table, init, c)), rows, k // 2)
    close(c, a.double() @ b.double().T + init.double(), scale=4)


def test_only_known_devices_and_dtypes() -> None:
    with pytest.raises(ValueError, match="no kernels for device 'abacus'"):
        create("abacus", torch.bfloat16, False)
    with pytest.raises(ValueError, match=r"no CPU kernels for torch\.float16"):
        create("cpu", torch.float16, False)
    with pytest.raises(ValueError, match="even number of inputs"):
        create("cpu", torch.bfloat16, False).pack_linear(torch.zeros(4, 3).bfloat16(), None)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_experts(kernels: Kernels, rows: int, normalise: bool) -> None:
    """Against the reference; a row alone, and with other threads, has the same bits."""
    check = MixtureCheck(kernels, experts=11, chosen=4, hidden=100, size=70, seed=rows)
    got = check.run(rows, normalise)
    for row in range(0, rows, 9):
        assert torch.equal(check.run(slice(row, row + 1), normalise)[0], got[row])
    team = create("cpu", kernels.dtype, False)
    team.set_threads(3)
    assert torch.equal(check.run(rows, normalise, team), got)
    team.set_threads(1)


def test_a_nan_row_stays_in_its_row(kernels: Kernels) -> None:
    check = MixtureCheck(kernels, experts=4, chosen=2, hidden=64, size=32, seed=0)
    expected = check.run(9, True)
    check.scores[4], check.x[4] = float("nan"), float("nan")
    got = check.run(9, True, compare=False)
    assert got[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(got[others], expected[others])
