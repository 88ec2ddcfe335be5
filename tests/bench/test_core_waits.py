"""Counts of the kernel's, of threads that want the same core."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from albireo.bench.core_waits import CoreWaits

_BUSY_THREAD = """
import os, threading
os.sched_setaffinity(0, [{core}])
def work():
    while True:
        pass
threading.Thread(target=work, daemon=True).start()
input()
"""


def test_threads_that_want_one_core_wait_for_each_other() -> None:
    code = _BUSY_THREAD.format(core=min(os.sched_getaffinity(0)))
    both = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) for _ in range(2)]
    try:
        waits = CoreWaits({"one": both[0].pid, "other": both[1].pid, "gone": 2**22 + 1})
        deadline = time.monotonic() + 30
        waited: dict[str, float] = {}
        while min(waited.get("one", 0.0), waited.get("other", 0.0)) < 200:
            assert time.monotonic() < deadline, waited
            time.sleep(0.05)
            waited = waits.waited()
    finally:
        for each in both:
            each.kill()
            each.communicate()
    assert set(waited) == {"one", "other"}
    assert waits.waited() == {}, "they have ended"


def test_what_a_host_lends_to_others(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  973088 7 207110 5024110 23121 1 3405 3962 0 0\ncpu0 1 2 3\n")
    waits = CoreWaits({}, stat)
    assert waits.stolen_ms() == 0
    stat.write_text("cpu  973099 7 207110 5024122 23121 1 3405 3965 0 0\ncpu0 1 2 3\n")
    assert waits.stolen_ms() == 3 * 1000 / os.sysconf("SC_CLK_TCK")
    assert CoreWaits({}, tmp_path / "none").stolen_ms() == 0
    stat.write_text("cpu  1 2 3 4\ncpu0 1 2 3 4\n")
    assert CoreWaits({}, stat).stolen_ms() == 0, "an old kernel"
