"""Messages between actors over ZeroMQ, and frames on a byte stream."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.ipc import link
from albireo.ipc.framing import FrameEncoder, FrameSplitter, FrameTooLarge
from albireo.ipc.link import Hub, MessageTooLarge, PeerGone, Spoke
from albireo.ipc.messages import Abort, Credit, Joined
from albireo.ipc.protocol import ClientMessage, Detokenize, Generate, Hello, Tokenize

DEADLINE_S = 10.0
ToHub = Joined | Abort
ToSpoke = Credit


class Node:
    """One hub and the spokes of a test, all closed at its end."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.hub: Hub[ToHub] = Hub(path, ToHub)
        self.spokes: list[Spoke[ToSpoke]] = []

    def join(self, identity: str, incarnation: int) -> Spoke[ToSpoke]:
        spoke: Spoke[ToSpoke] = Spoke(self.path, identity, ToSpoke)
        self.spokes.append(spoke)
        spoke.send(Joined("tokenizer", -1, incarnation, 1))
        peer, message = arrivals(self.hub, 1)[0]
        assert peer == identity.encode()
        assert message == Joined("tokenizer", -1, incarnation, 1)
        return spoke

    def close(self) -> None:
        self.hub.close()
        for spoke in self.spokes:
            spoke.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(f"{tmp_path}/router.zmq")
    yield node
    node.close()


def arrivals(link: Hub[Any] | Spoke[Any], count: int) -> list[Any]:
    """The next `count` messages; fails after the deadline."""
    got: list[Any] = []
    end = time.monotonic() + DEADLINE_S
    while len(got) < count:
        left_ms = int((end - time.monotonic()) * 1000)
        assert left_ms > 0 and link.socket.poll(left_ms, zmq.POLLIN), f"{len(got)} of {count} came"
        got.extend(link.drain())
    assert len(got) == count
    return got


def test_an_unknown_peer_is_an_error_not_a_silence(node: Node) -> None:
    with pytest.raises(PeerGone, match=r"tokenizer\.1 is not connected"):
        node.hub.send(b"tokenizer.1", Credit(1))


def test_order_is_kept_in_both_directions(node: Node) -> None:
    spoke = node.join("tokenizer.1", 1)
    count = 2000
    for k in range(count):
        spoke.send(Abort(k))
        node.hub.send(b"tokenizer.1", Credit(k))
    assert arrivals(node.hub, count) == [(b"tokenizer.1", Abort(k)) for k in range(count)]
    assert arrivals(spoke, count) == [Credit(k) for k in range(count)]


def test_a_spoke_may_come_before_its_hub(tmp_path: Path) -> None:
    path = f"{tmp_path}/late.zmq"
    spoke: Spoke[ToSpoke] = Spoke(path, "early", ToSpoke)
    spoke.send(Abort(1))
    hub: Hub[ToHub] = Hub(path, ToHub)
    try:
        assert arrivals(hub, 1) == [(b"early", Abort(1))]
        hub.send(b"early", Credit(2))
        assert arrivals(spoke, 1) == [Credit(2)]
    finally:
        spoke.close()
        hub.close()


def test_a_new_incarnation_is_a_new_peer(node: Node) -> None:
    old = node.join("tokenizer.1", 1)
    old.close()
    new = node.join("tokenizer.2", 2)
    end = time.monotonic() + DEADLINE_S
    with pytest.raises(PeerGone):
        while time.monotonic() < end:  # until ZeroMQ has seen the end of the old connection
            node.hub.send(b"tokenizer.1", Credit(1))
            time.sleep(0.01)
    node.hub.send(b"tokenizer.2", Credit(2))
    assert arrivals(new, 1) == [Credit(2)]


def test_an_identity_that_comes_back_takes_the_place_over(node: Node) -> None:
    """Its old connection may still look alive to ZeroMQ: messages go to the new one."""
    node.join("supervisor", 1)
    back = node.join("supervisor", 1)
    node.hub.send(b"supervisor", Credit(7))
    assert arrivals(back, 1) == [Credit(7)]


def test_drain_does_not_wait(node: Node) -> None:
    assert list(node.hub.drain()) == []
    assert list(node.join("tokenizer.1", 1).drain()) == []


@pytest.mark.parametrize("sender", ["hub", "spoke"])
def test_a_message_that_would_not_arrive_is_an_error_not_a_silence(
    node: Node, sender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeroMQ would end the connection of whoever is sent more than MAXMSGSIZE."""
    monkeypatch.setattr(link, "MAX_MESSAGE_BYTES", 10_000)
    node = Node(f"{node.path}.small")
    spoke = node.join("tokenizer.1", 1)
    send = spoke.send if sender == "spoke" else partial(node.hub.send, b"tokenizer.1")
    with pytest.raises(MessageTooLarge, match=r"Joined of 10\d\d\d bytes .* the limit is 10000"):
        send(Joined("x" * 10_000, -1, 1, 1))
    spoke.send(Abort(1))
    node.hub.send(b"tokenizer.1", Credit(2))
    assert arrivals(node.hub, 1) == [(b"tokenizer.1", Abort(1))]
    assert arrivals(spoke, 1) == [Credit(2)]
    node.close()


# ------------------------------------------------------------ frames on a byte stream
client_messages: st.SearchStrategy[ClientMessage] = st.one_of(
    st.builds(Hello, protocol=st.integers(0, 9), client=st.text(max_size=20)),
    st.builds(Generate, id=st.integers(0, 2**31), prompt=st.text(max_size=200)),
    st.builds(
        Detokenize, id=st.integers(0, 9), token_ids=st.lists(st.integers(0, 2**31), max_size=50)
    ),
)


@given(
    messages=st.lists(client_messages, max_size=8),
    cuts=st.lists(st.floats(0, 1), max_size=30),
)
@settings(deadline=None, derandomize=True)
def test_any_split_of_the_stream_gives_the_same_payloads(
    messages: list[ClientMessage], cuts: list[float]
) -> None:
    encoder = FrameEncoder()
    stream = b"".join([encoder.encode(message) for message in messages])
    splitter = FrameSplitter()
    payloads = []
    edges = [0, *sorted(int(cut * len(stream)) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        payloads += splitter.feed(stream[start:end])
    assert payloads == [msgspec.msgpack.encode(message) for message in messages]


def test_byte_by_byte() -> None:
    frame = FrameEncoder().encode(Tokenize(id=1, text="héllo"))
    splitter = FrameSplitter()
    assert [splitter.feed(frame[k : k + 1]) for k in range(len(frame) - 1)] == [[]] * (
        len(frame) - 1
    )
    assert splitter.feed(frame[-1:]) == [frame[4:]]


def test_the_encoder_shrinks_after_a_large_message() -> None:
    encoder = FrameEncoder()
    large = encoder.encode(Tokenize(id=1, text="x" * 200_000))
    small = encoder.encode(Tokenize(id=2, text="y"))
    assert FrameSplitter().feed(large + small) == [large[4:], small[4:]]
    assert len(small) < 100


@pytest.mark.parametrize(("announced", "fits"), [(100, True), (101, False), (2**32 - 1, False)])
def test_a_frame_above_the_limit_is_refused_by_its_prefix(announced: int, fits: bool) -> None:
    splitter = FrameSplitter(max_frame_bytes=100)
    prefix = announced.to_bytes(4, "little")
    if fits:
        assert splitter.feed(prefix + bytes(99)) == []
        assert splitter.feed(b"\0") == [bytes(100)]
    else:
        assert splitter.feed(prefix[:3]) == []
        with pytest.raises(FrameTooLarge, match=f"{announced} bytes is announced; the limit is"):
            splitter.feed(prefix[3:])


def test_a_hub_drops_what_is_no_message(tmp_path: Path) -> None:
    path = str(tmp_path / "h")
    hub: Hub[Joined] = Hub(path, Joined)
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.setsockopt(zmq.IDENTITY, b"\xff\xfe")
    stranger.connect(f"ipc://{path}")
    deep = b"\x91" * 5000
    for parts in ([b"\xc1"], [b"a", b"b", b"c"], [b""], [deep], [b"\x93\x01"]):
        stranger.send_multipart(parts)
    good = Joined("tokenizer", -1, 0, 1)
    stranger.send(msgspec.msgpack.encode(good))
    found: list[object] = []
    while not found:
        assert hub.socket.poll(5000)
        found += [message for _, message in hub.drain()]
    assert found == [good]
    stranger.close()
    hub.close()
