"""NVLink multicast is off unless the user has said otherwise."""

from __future__ import annotations

from albireo.workers.parallel.multicast import stay_off


def test_what_the_user_has_set_stays() -> None:
    environment = {"NCCL_NVLS_ENABLE": "1"}
    stay_off(environment)
    assert environment == {"NCCL_NVLS_ENABLE": "1", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
