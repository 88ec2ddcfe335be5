"""Texts that wait for the tokenizer: tenants take turns, each has its own in order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from albireo.ipc.messages import Decoded, Encoded, TextFailed, ToTokenizer

Answer = Encoded | Decoded | TextFailed


class TextJob:
    """A text on its way to the tokenizer and back.

    tenant: whose turn it takes.
    done: called with the answer, unless the job was cancelled before.
    size: bytes that it stands for: of its message, or of its ids in memory.
    deadline: time on the queue's clock at which it is given up.
    """

    __slots__ = ("cancelled", "deadline", "done", "message", "size", "tenant", "tries")

    def __init__(
        self,
        message: ToTokenizer,
        tenant: str,
        size: int,
        deadline: float,
        done: Callable[[Answer], None],
    ) -> None:
        self.message = message
        self.tenant = tenant
        self.size = size
        self.deadline = deadline
        self.done = done
        self.tries = 0
        self.cancelled = False


class WaitingTexts:
    """Jobs by tenant; ahead of all those that were with a tokenizer that died."""

    def __init__(self) -> None:
        self._again: OrderedDict[int, TextJob] = OrderedDict()
        self._turns: OrderedDict[str, OrderedDict[int, TextJob]] = OrderedDict()
        self._last = ""
        """Who had the last turn: nobody has two in a row while another waits."""

    def __len__(self) -> int:
        return len(self._again) + sum(map(len, self._turns.values()))

    def add(self, job: TextJob) -> None:
        self._turns.setdefault(job.tenant, OrderedDict())[job.message.key] = job

    def put_back(self, jobs: list[TextJob]) -> None:
        """Those that a tokenizer had when it died, in their order: they go first."""
        for job in reversed(jobs):
            self._again[job.message.key] = job
            self._again.move_to_end(job.message.key, last=False)

    def next(self) -> TextJob | None:
        """Whose turn it is; the job stays until it is taken."""
        if self._again:
            return next(iter(self._again.values()))
        tenants = iter(self._turns)
        tenant = next(tenants, None)
        if tenant is None:
            return None
        if tenant == self._last:
            tenant = next(tenants, tenant)
        return next(iter(self._turns[tenant].values()))

    def take(self, job: TextJob) -> None:
        """It has gone to the tokenizer: its tenant comes behind the others."""
        fresh = job.message.key not in self._again
        self.remove(job)
        if fresh:
            self._last = job.tenant
            if job.tenant in self._turns:
                self._turns.move_to_end(job.tenant)

    def remove(self, job: TextJob) -> bool:
        """Whether it was there."""
        key = job.message.key
        if self._again.pop(key, None) is not None:
            return True
        own = self._turns.get(job.tenant)
        if own is None or own.pop(key, None) is None:
            return False
        if not own:
            del self._turns[job.tenant]
        return True

    def overdue(self, now: float) -> list[TextJob]:
        """Those whose deadline has passed; they stay."""
        found = []
        for jobs in (self._again, *self._turns.values()):
            for job in jobs.values():
                if now < job.deadline:
                    break
                found.append(job)
        return found
