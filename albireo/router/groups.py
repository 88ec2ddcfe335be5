"""The groups of the node: which can take a request, and what runs on each.

A group can be used from its detokenizer's Joined until its GroupDown, or until
it cannot be reached; then it has to join again (actors.py).  `peer`, the
detokenizer's identity, names the incarnation: what comes from any other
identity is of the past.

A request goes where least is outstanding; a token of its prompt that a group is
likely to have in its prefix cache counts as FOUND_WORTH tokens less there.  So
requests with a common prefix stay together until their group is clearly busier.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from albireo.ipc.messages import SchedulerStats

from .affinity import GroupPrefixes, names_of
from .latencies import GroupLatencies
from .requests import Refusal, Stream

FOUND_WORTH = 2
_FEW = 64
"""A tenant has few requests in flight where it is one of so many that would fill the node."""
_KEPT = 8
"""Such a part of what the node takes is there for those, besides."""
_NO_COST = (True, float("inf"), 0)
_GONE = ("failed", "stopped")
_READY = (None, "ready")  # as announced, of a group that is there


class Group:
    """One group.

    state: as in Topology; "ready" also as soon as it has joined.
    incarnation: of the detokenizer that has joined; -1 when none has.
    ended: the last incarnation known to be dead.
    lost_at: when it was found, by time.monotonic(), that it cannot be reached; None while it can.
    outstanding_tokens: prompt and new tokens that its streams may still need.
    prefixes: that its cache is likely to hold; None = it has none, or there is no other group.
    found_tokens: of prompts that it was given, those that were likely to be there.
    latencies: of all its answers since this router started.
    """

    __slots__ = (
        "announced",
        "ended",
        "found_tokens",
        "incarnation",
        "latencies",
        "lost_at",
        "number",
        "outstanding_tokens",
        "peer",
        "prefixes",
        "served",
        "stats",
        "streams",
    )

    def __init__(self, number: int, prefixes: GroupPrefixes | None) -> None:
        self.number = number
        self.prefixes = prefixes
        self.found_tokens = 0
        self.announced: str | None = None
        self.peer: bytes | None = None
        self.incarnation = -1
        self.ended = -1
        self.lost_at: float | None = None
        self.streams: dict[int, Stream] = {}
        self.outstanding_tokens = 0
        self.served = 0
        self.stats: SchedulerStats | None = None
        self.latencies = GroupLatencies()

    @property
    def state(self) -> str:
        """As the supervisor announced it; "ready" only where requests can be sent there too."""
        if self.announced is None or self.announced == "ready":
            if self.lost_at is not None:
                return "restarting"
            return "starting" if self.peer is None else "ready"
        return self.announced

    def add(self, stream: Stream) -> None:
        stream.group = self
        self.streams[stream.request] = stream
        self.outstanding_tokens += stream.left_tokens
        self.served += 1
        if self.prefixes is not None:
            self.found_tokens += self.prefixes.found(stream.prefix)
            self.prefixes.add(stream.prefix)

    def remember(self, stream: Stream) -> None:
        """An answer has ended whole: its tokens are part of the next turn's prompt."""
        assert stream.submit is not None
        if self.prefixes is not None:
            tokens = stream.submit.prompt_ids + stream.token_ids
            salt = stream.submit.cache_salt
            self.prefixes.add(names_of(tokens, salt, stream.prefix))

    def remove(self, stream: Stream) -> None:
        del self.streams[stream.request]
        stream.group = None
        self.outstanding_tokens -= stream.left_tokens


class GroupTable:
    """All groups, and the streams that wait for one.

    max_num_seqs, max_num_queued_reqs: of each group.
    cached_tokens: that a group's prefix cache can hold; 0 = it has none.
    """

    def __init__(
        self,
        num_groups: int,
        max_num_seqs: int,
        max_num_queued_reqs: int,
        cached_tokens: int = 0,
    ) -> None:
        self._affinity = num_groups > 1 and cached_tokens > 0
        self._groups = [
            Group(number, GroupPrefixes(cached_tokens) if self._affinity else None)
            for number in range(num_groups)
        ]
        self._by_peer: dict[bytes, Group] = {}
        self._max_num_seqs = max_num_seqs
        self._max_num_queued_reqs = max_num_queued_reqs
        self.waiting: dict[int, Stream] = {}
        """Streams without a group, oldest first, by their request number."""

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def of(self, peer: bytes) -> Group | None:
        """The group whose present detokenizer has this identity."""
        return self._by_peer.get(peer)

    def choose(self, stream: Stream) -> Group | None:
        """The best group for a stream of those that have room; ready ones first.

        Between equals, the one that has served less.
        """
        room = self._max_num_seqs + self._max_num_queued_reqs
        if self._affinity and not stream.prefix and stream.submit is not None:
            stream.prefix = names_of(stream.submit.prompt_ids, stream.submit.cache_salt)
        best, least = None, _NO_COST
        prefix = stream.prefix
        first = prefix[0] if prefix else None
        for group in self._by_peer.values():
            if len(group.streams) >= room or group.announced == "draining":
                continue
            tokens = group.outstanding_tokens
            if first is not None and (known := group.prefixes) is not None and first in known.names:
                tokens -= FOUND_WORTH * known.found(prefix)
            cost = group.announced not in _READY, tokens, group.served
            if cost < least:
                best, least = group, cost
        return best

    def hopeless(self) -> Refusal | None:
        """Why no group can be waited for, or None."""
        if self._by_peer or any(group.state not in _GONE for group in self._groups):
            return None
        return Refusal(
            "unavailable",
            f"none of the node's {len(self._groups)} groups is running, and none is starting; "
            "see `albireo node status`",
            retry=True,
        )

    def admit(self, in_flight: int, answers: int, own: int) -> None:
        """Raises Refusal when so many answers more than those `in_flight` cannot be taken.

        own: of these, the same tenant's.  For those with few there is some room that the others
        cannot fill, so that nobody shuts all others out.
        """
        refusal = self.hopeless()
        if refusal is not None:
            raise refusal
        seqs, queued = self._max_num_seqs, self._max_num_queued_reqs
        most = len(self._groups) * (seqs + queued)
        if answers > most:
            raise Refusal(
                "invalid_request",
                f"this request asks for {answers} answers; the node takes {most} "
                f"({len(self._groups)} groups x ({seqs} running + {queued} queued)): ask for "
                "fewer, or start it with a larger --max-num-queued-reqs",
                param="n",
            )
        # One that loads its weights again is soon to run what it ran before.
        alive = sum(group.state not in _GONE for group in self._groups)
        capacity = alive * (seqs + queued)
        how = f"{alive} groups x ({seqs} running + {queued} queued)"
        if not self._by_peer:
            how += ", and no group is ready yet"
        if own + answers <= capacity // _FEW:
            kept = min(capacity // _KEPT, len(self._groups) * queued)
            capacity, how = capacity + kept, f"{how} + {kept} of clients with few"
        if in_flight + answers > capacity:
            more = "" if answers == 1 else f", and this one asks for {answers}"
            raise Refusal(
                "queue_full",
                f"{in_flight} answers are in flight{more}; the node takes {capacity} ({how}): "
                "try again later, or start it with a larger --max-num-queued-reqs",
                retry=True,
            )

    def joined(self, peer: bytes, number: int, incarnation: int) -> list[Stream] | None:
        """A detokenizer is there: its group can be used.

        Returns the streams of an older incarnation, which are lost, or None when
        the message is of the past or says nothing new.
        """
        if not 0 <= number < len(self._groups):
            return None
        group = self._groups[number]
        if incarnation <= group.ended or incarnation <= group.incarnation:
            return None
        lost = self._close(group)
        group.peer = peer
        group.incarnation = incarnation
        self._by_peer[peer] = group
        return lost

    def down(self, number: int, incarnation: int) -> list[Stream]:
        """An incarnation of a group has died; returns the streams that were lost with it."""
        if not 0 <= number < len(self._groups):
            return []
        group = self._groups[number]
        group.ended = max(group.ended, incarnation)
        if incarnation < group.incarnation:
            return []
        if group.announced not in _GONE:
            group.announced = "restarting"
        return self._close(group)

    def lose(self, group: Group, now: float) -> None:
        """A group cannot be reached: it gets no more; why, the supervisor is about to say."""
        if group.peer is not None:
            self._by_peer.pop(group.peer, None)
        if group.lost_at is None:
            group.lost_at = now

    def give_up(self, group: Group) -> list[Stream]:
        """Nobody says why: returns its streams, which it is to forget before it joins again."""
        return self._close(group)

    def set_states(self, states: Sequence[str]) -> None:
        """What the supervisor says of the groups."""
        for group, state in zip(self._groups, states, strict=False):
            group.announced = state

    def set_sizes(self, cached_tokens: Iterable[int]) -> None:
        """How many tokens each group's KV blocks hold."""
        for group, tokens in zip(self._groups, cached_tokens, strict=False):
            if group.prefixes is not None:
                group.prefixes.resize(tokens)

    def _close(self, group: Group) -> list[Stream]:
        lost = list(group.streams.values())
        for stream in lost:
            stream.group = None
        if group.peer is not None:
            self._by_peer.pop(group.peer, None)
        group.peer = None
        group.incarnation = -1
        group.lost_at = None
        group.streams = {}
        group.outstanding_tokens = 0
        if group.prefixes is not None:
            group.prefixes.clear()
        group.stats = None
        group.latencies.cut_off()
        return lost
