"""What a worker and its parent, both of one user and one version, say to each other: pickles, and arrays beside them.

An array that several requests share is sent once. Small ones ride in the pickle, big ones are received straight into
the memory of the array that the caller gets, so full logits are held once and freed with it. All can be written to.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import select
import socket
import struct
from collections.abc import Callable, Sequence
from logging import LogRecord
from typing import Any

import msgspec
import numpy as np

from rl_onoff.backends.engine import EngineInfo
from rl_onoff.types import Rollout, SampleRequest, TokenScores, Want

PROTOCOL = 4  # raise it whenever a message changes its meaning
PREAMBLE = "rl-onoff worker %08d\n"  # a worker's first bytes, the same in every version so that a mismatch can be told
INLINE_BYTES = 1 << 16  # arrays below this ride in the pickle: a bigger one has memory of its own to free
PERIOD = 0.2  # seconds between two looks at whether the other end is there, while waiting for it

Work = SampleRequest | Rollout  # one response to sample or to score


class Assignment(msgspec.Struct):
    """To the worker: sample these requests, which may join those of a call that is being answered; or score these."""

    call: int  # the call's number: what crosses with the end of a call must not change the next one
    work: Sequence[Work]
    want: Want | None  # what is to be scored; None: the work is to be sampled
    last: bool  # no further work of this call will come


class Cancel(msgspec.Struct):
    """To the worker: nobody reads this call's results any more."""

    call: int


class Close(msgspec.Struct):
    """To the worker: free the engine and end."""


class End(msgspec.Struct):
    """From the worker: all results of the call were sent, or an exception ended the load or the call."""

    error: str = ""  # the name of the exception's class in rl_onoff.errors; empty: there was none
    text: str = ""


ToWorker = Assignment | Cancel | Close
FromWorker = EngineInfo | Rollout | TokenScores | End | LogRecord  # once loaded; results; warnings of rl_onoff


class PeerGoneError(Exception):
    """The other end of the channel has closed."""


class Channel:
    """Messages to and from a worker over a socket pair, which holds a worker back that runs ahead of its reader.

    `check` is called every PERIOD seconds while waiting, and may raise: the socket tells at once when its other end is
    gone, but a forked grandchild of a dead worker may still hold that open.
    """

    torn = False  # a message was cut in the middle, by Ctrl-C say: nothing that follows can be understood

    def __init__(self, sock: socket.socket, check: Callable[[], None] = lambda: None):
        self._sock, self._check = sock, check
        sock.settimeout(PERIOD)

    def send(self, message: ToWorker | FromWorker) -> None:
        header, buffers = dumped(message)
        sizes = [buffer.nbytes for buffer in buffers]
        self.torn = True
        self.send_raw(struct.pack(f"<QI{len(sizes)}Q", len(header), len(sizes), *sizes) + header)
        for buffer in buffers:
            self.send_raw(buffer)
        self.torn = False

    def receive(self) -> Any:
        while not self.readable(PERIOD):
            self._check()
        self.torn = True
        header_size, num_buffers = struct.unpack("<QI", self.receive_raw(12))
        sizes = struct.unpack(f"<{num_buffers}Q", self.receive_raw(8 * num_buffers))
        header = self.receive_raw(header_size)
        buffers = [self.receive_raw(size) for size in sizes]
        self.torn = False
        return pickle.loads(header, buffers=buffers)

    def receive_raw(self, size: int) -> memoryview:
        """The next `size` bytes, in memory of their own. Raises PeerGoneError."""
        data = view = np.empty(size, np.uint8).data  # numpy's memory: aligned, and not cleared first
        while view:
            view = view[self.read(view) :]
        return data

    def readable(self, seconds: float) -> bool:
        """Whether something, or the end, has arrived; waits up to `seconds` for it."""
        if self._sock.fileno() < 0:
            raise PeerGoneError
        poll = select.poll()  # a new one: an actor's threads wait side by side, which one object refuses
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(int(seconds * 1000)))

    def read(self, into: memoryview) -> int:
        """Read what has arrived, after a wait; returns the number of bytes. Raises PeerGoneError at the end."""
        return self._some(self._sock.recv_into, into)

    def send_raw(self, data: bytes | memoryview) -> None:
        """Send all of the bytes. Raises PeerGoneError."""
        view = memoryview(data)
        while view:
            view = view[self._some(self._sock.send, view) :]

    def _some(self, move: Callable[[memoryview], int], memory: memoryview) -> int:
        """How many bytes were moved, once some could be."""
        while True:
            try:
                if count := move(memory):
                    return count
                raise PeerGoneError
            except TimeoutError:
                self._check()
            except OSError as e:
                raise PeerGoneError from e

    def close(self) -> None:
        self._sock.close()


def dumped(message: Any) -> tuple[bytes, list[memoryview]]:
    """A message as a pickle, and the memory of its big arrays."""
    file, buffers = io.BytesIO(), []

    def in_the_pickle(buffer: pickle.PickleBuffer) -> bool:
        if (memory := buffer.raw()).nbytes >= INLINE_BYTES:
            buffers.append(memory)
        return memory.nbytes < INLINE_BYTES

    pickler = pickle.Pickler(file, protocol=5, buffer_callback=in_the_pickle)
    pickler.dispatch_table = {**copyreg.dispatch_table, np.ndarray: _reduced}
    pickler.dump(message)
    return file.getvalue(), buffers


def _reduced(array: np.ndarray) -> tuple[Any, ...]:
    """How an array is pickled: contiguous, and from memory that can be written to, as then the copy can be, too."""
    array = np.require(array, requirements=["C", "W"])
    return np.ndarray, (array.shape, array.dtype.str, pickle.PickleBuffer(array.data))
