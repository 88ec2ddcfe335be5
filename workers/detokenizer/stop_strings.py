"""Finds stop strings in a text that comes in pieces.

The answer ends at the first character with which some stop string is complete;
of several that end there, the longest one counts.  So what is found depends on
the text alone, not on how it was cut into tokens.  (Waiting for the match that
*starts* first would hold an answer back although one of its stop strings is
already there; the two differ only where one stop string contains another.)

A matcher gives text out as soon as no stop string can begin in it: what it
holds back is the longest end of the text that is the beginning of one.  The
automaton is that of Aho and Corasick, a state for every such beginning.
"""

from __future__ import annotations

from weakref import WeakValueDictionary


class StopAutomaton:
    """States of a set of stop strings; state 0 is the empty beginning.

    depth: characters that a state stands for.  found: the longest stop string
    that ends in it, if any.
    """

    __slots__ = ("__weakref__", "_fallback", "_next", "depth", "found")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depth = [0]
        self.found: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while True:
            following = self._next[state].get(character)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self._fallback[state]

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self.found.append(None)
            state = following
        self.found[state] = stop

    def _link(self) -> None:
        """Sets each state's fallback: the longest shorter beginning that it ends with."""
        for state in sorted(range(len(self._next)), key=self.depth.__getitem__):
            for character, following in self._next[state].items():
                if state:
                    self._fallback[following] = self.step(self._fallback[state], character)
                if self.found[following] is None:
                    self.found[following] = self.found[self._fallback[following]]


_automata: WeakValueDictionary[tuple[str, ...], StopAutomaton] = WeakValueDictionary()


def automaton(stops: tuple[str, ...]) -> StopAutomaton:
    """That of these stop strings, shared by the requests that have them.

    It goes with the last of these: one of the largest sets allowed takes more than a megabyte.
    """
    found = _automata.get(stops)
    if found is None:
        found = _automata[stops] = StopAutomaton(stops)
    return found


class StopMatcher:
    """The search in one answer's text."""

    __slots__ = ("_automaton", "_held", "_include", "_state")

    def __init__(self, stops: tuple[str, ...], include_stop: bool) -> None:
        self._automaton = automaton(stops)
        self._include = include_stop
        self._state = 0
        self._held = ""

    def add(self, text: str, counts: bool) -> tuple[str, str | None]:
        """More text; returns the text that may be shown now, and the stop string found or None.

        counts: whether a stop string that is complete within this piece ends
        the answer.  One that does not count is text like any other.
        """
        automaton = self._automaton
        found = automaton.found
        step = automaton.step
        state = self._state
        for at, character in enumerate(text):
            state = step(state, character)
            stop = found[state]
            if stop is not None and counts:
                seen = self._held + text[: at + 1]
                self._held = ""
                return (seen if self._include else seen[: -len(stop)]), stop
        self._state = state
        seen = self._held + text
        sure = len(seen) - automaton.depth[state]
        self._held = seen[sure:]
        return seen[:sure], None

    def flush(self) -> str:
        """What was held back, at the end of an answer without a stop string."""
        held, self._held = self._held, ""
        return held
