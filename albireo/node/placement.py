"""Which group gets which GPUs: ranks that sum at every layer should be near to each other.

How near NVML says: linked by NVLink, directly or through a switch; else by the
place where their PCIe paths meet, from one board to across the processors'
sockets.  Where it does not say, as in some virtual machines, all are alike, and
groups get GPUs that follow each other.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .gpus import Gpu
from .options import OptionError

LINKED = 0
"""The distance over NVLink; over PCIe it is NVML's level of the common ancestor, more than 0."""

Distance = Callable[[Gpu, Gpu], int]
Groups = list[tuple[Gpu, ...]]


def assign(groups: Sequence[int], gpus: Sequence[Gpu], distance: Distance) -> Groups:
    """GPUs for the ranks of each group: such that follow each other, unless others are nearer.

    Raises OptionError when there are too few.
    """
    needed = sum(groups)
    if needed > len(gpus):
        names = ", ".join(sorted({gpu.name for gpu in gpus})) or "none"
        raise OptionError(
            f"--groups asks for {needed} ranks with a GPU each, but {len(gpus)} are visible "
            f"({names}); lower --groups or look at CUDA_VISIBLE_DEVICES"
        )
    ends = [sum(groups[: number + 1]) for number in range(len(groups))]
    consecutive = [tuple(gpus[end - tp : end]) for end, tp in zip(ends, groups, strict=True)]
    near = _nearest(groups, gpus, distance)
    return min(consecutive, near, key=lambda made: _cost(made, distance))


def _nearest(groups: Sequence[int], gpus: Sequence[Gpu], distance: Distance) -> Groups:
    """The largest group has the first choice: the nodes there are have 16 GPUs at most."""
    left = list(gpus)
    made: Groups = [()] * len(groups)
    for number in sorted(range(len(groups)), key=lambda number: -groups[number]):
        choices = itertools.combinations(left, groups[number])
        made[number] = min(choices, key=lambda choice: _cost([choice], distance))
        left = [gpu for gpu in left if gpu not in made[number]]
    return made


def _cost(groups: Iterable[Sequence[Gpu]], distance: Distance) -> tuple[int, int]:
    """Of all pairs of GPUs in a group, the farthest and the sum: a sum waits for the farthest."""
    pairs = itertools.chain.from_iterable(itertools.combinations(each, 2) for each in groups)
    distances = [distance(*pair) for pair in pairs]
    return max(distances, default=0), sum(distances)


def nvml_distance(gpus: Sequence[Gpu]) -> Distance:
    """What NVML says of these; it is asked once, when there is a pair whose distance matters."""

    @functools.cache
    def known() -> dict[tuple[str, str], int]:
        import pynvml

        pynvml.nvmlInit()
        try:
            return _ask(pynvml, [gpu.uuid for gpu in gpus])
        finally:
            pynvml.nvmlShutdown()

    return lambda one, other: known()[one.uuid, other.uuid]


def _ask(nvml: Any, uuids: Sequence[str]) -> dict[tuple[str, str], int]:
    handles = {uuid: nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids}
    known: dict[tuple[str, str], int] = {}
    for one, other in itertools.combinations(uuids, 2):
        near = _distance(nvml, handles[one], handles[other])
        known[one, other] = known[other, one] = near
    return known


def _distance(nvml: Any, one: Any, other: Any) -> int:
    try:
        link = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if link == nvml.NVML_P2P_STATUS_OK:
            return LINKED
        # On one board the level is 0, which NVLink alone is to be.
        return 1 + int(nvml.nvmlDeviceGetTopologyCommonAncestor(one, other))
    except nvml.NVMLError:
        return 1 + int(nvml.NVML_TOPOLOGY_SYSTEM)
