"""NVLink multicast stays off unless the user turns it on: not every machine's fabric is in order.

No kernel of ours asks for it; PyTorch's symmetric memory and NCCL would, where they can.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def stay_off(environment: MutableMapping[str, str] = os.environ) -> None:
    """What is set already stays: `NCCL_NVLS_ENABLE=1` lets NCCL use it."""
    for name, value in _OFF.items():
        environment.setdefault(name, value)
