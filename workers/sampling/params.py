"""The sampling parameters of all slots, as the row kernel reads them: one array a parameter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class SlotParams:
    """Indexed by slot; see ipc.params.SamplingParams for the meanings.

    seed: uint64.  temperature, top_p, min_p: float32, 0, 1 and 0 where off.
    top_k: int32, 0 where off.
    """

    seed: npt.NDArray[np.uint64]
    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]

    @classmethod
    def zeros(cls, slots: int) -> SlotParams:
        """Greedy with seed 0 in every slot."""
        return cls(
            seed=np.zeros(slots, np.uint64),
            temperature=np.zeros(slots, np.float32),
            top_k=np.zeros(slots, np.int32),
            top_p=np.ones(slots, np.float32),
            min_p=np.zeros(slots, np.float32),
        )


@dataclass(frozen=True, slots=True)
class SampleRows:
    """The R sampling rows of a step, in their order; all int32 [R].

    slots: whose parameters apply.  requests: whom the token belongs to.
    positions: index in the sequence of the token that is chosen.
    """

    slots: npt.NDArray[np.int32]
    requests: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.slots)

    def only(self, which: npt.NDArray[np.int64]) -> SampleRows:
        """These rows alone."""
        return SampleRows(
            slots=self.slots[which], requests=self.requests[which], positions=self.positions[which]
        )


@dataclass(frozen=True, slots=True)
class ScoreRows:
    """The prompt positions that a step scores, in the plan's order; all int32 [S].

    requests: whose prompt.  positions, tokens: of the prompt token that is described.
    """

    requests: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)
