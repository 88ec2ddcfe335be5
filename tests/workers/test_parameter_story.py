"""All sampling parameters on the CPU's engine, against one forward pass over each sequence."""

from __future__ import annotations

import msgspec
import pytest
import torch

from albireo.workers.engine.engine import Engine
from albireo.workers.models.load import load_model
from albireo.workers.parallel.communicator import SingleRank

from .engine_story import CONFIG, CPU_KERNELS
from .parameter_story import PARAMETERS, ParameterStory, check_story


@pytest.mark.parametrize("seed", [3, 4])
def test_all_parameters_against_one_forward_pass(seed: int) -> None:
    engine = msgspec.structs.replace(PARAMETERS, device="cpu")
    (model,) = load_model("", CONFIG, torch.float32, "dummy", 1, CPU_KERNELS, print)
    story = ParameterStory(Engine(model, CPU_KERNELS, engine, SingleRank()).step, 40, seed)
    story.play()
    check_story(story)
    assert all(count > 3 for count in story.moves.values()), story.moves
