"""What a worker and its parent say to each other, and how it travels: msgpack headers and raw array buffers.

Arrays are never turned into text: small ones ride in the header, big ones are received straight into the memory of
the array that the caller gets, so full logits are held once and freed with that array. All arrays that arrive can be
written to.
"""

from __future__ import annotations

import select
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import numpy as np

from rl_onoff.backends.engine import EngineInfo
from rl_onoff.types import Rollout, SampleRequest, Sampling, TokenScores, Want

PROTOCOL = 3  # raise it whenever a message changes its meaning
PREAMBLE = "rl-onoff worker %08d\n"  # a worker's first bytes, the same in every version so that a mismatch can be told
INLINE_BYTES = 1 << 16  # arrays below this ride in the header: a bigger one has memory of its own to free
PERIOD = 0.2  # seconds between two looks at whether the other end is there, while waiting for it


class Message(msgspec.Struct, kw_only=True, tag=True):
    """Base of all messages. `call` numbers the calls: the end of an abandoned call must not end the next one."""


class Load(Message):
    """To the worker, first: which backend it is."""

    target: str  # "module:Class"
    config: dict[str, Any]


class Requests(msgspec.Struct):
    """Requests as they travel: a prompt and a sampler that several of them share are written once."""

    prompts: list[np.ndarray]
    samplings: list[Sampling]
    rows: list[tuple[str, int, int, int, int]]  # request id, sample, seed, index of the prompt, index of the sampler

    @classmethod
    def pack(cls, requests: Iterable[SampleRequest]) -> Requests:
        prompts: dict[int, tuple[int, np.ndarray]] = {}  # by identity
        samplings: dict[int, tuple[int, Sampling]] = {}
        rows = []
        for request in requests:
            prompt, _ = prompts.setdefault(id(request.prompt_ids), (len(prompts), request.prompt_ids))
            sampling, _ = samplings.setdefault(id(request.sampling), (len(samplings), request.sampling))
            rows.append((request.request_id, request.sample, request.seed, prompt, sampling))
        return cls([ids for _, ids in prompts.values()], [sampling for _, sampling in samplings.values()], rows)

    def unpack(self) -> list[SampleRequest]:
        return [
            SampleRequest(
                request_id=id,
                sample=sample,
                seed=seed,
                prompt_ids=self.prompts[prompt],
                sampling=self.samplings[sampling],
            )
            for id, sample, seed, prompt, sampling in self.rows
        ]


class Generate(Message):
    """To the worker: sample these requests, which may join those of a call that is being answered."""

    call: int
    requests: Requests
    last: bool  # no further requests of this call will come


class Score(Message):
    call: int
    rollouts: list[Rollout]
    want: Want


class Cancel(Message):
    """To the worker: nobody reads this call's results any more."""

    call: int


class Close(Message):
    """To the worker: free the engine and end."""


class Loaded(Message):
    info: EngineInfo


class Completed(Message):
    call: int
    result: Rollout


class Scored(Message):
    call: int
    result: TokenScores


class Done(Message):
    call: int


class Failed(Message):
    """From the worker: an exception, by the name of its class in rl_onoff.errors."""

    call: int  # 0: while loading
    error: str
    text: str


class Logged(Message):
    """From the worker: a line that its own log file would hide from the user."""

    logger: str
    level: int
    text: str


AnyMessage = Load | Generate | Score | Cancel | Close | Loaded | Completed | Scored | Done | Failed | Logged


class PeerGoneError(Exception):
    """The other end of the channel has closed."""


class Channel(ABC):
    """Messages to and from a worker. `check` is called every PERIOD seconds while waiting, and may raise."""

    def __init__(self, check: Callable[[], None] = lambda: None):
        self._check = check
        self.torn = False  # a message was cut in the middle, by Ctrl-C say: nothing that follows can be understood
        self._sending: list[np.ndarray] = []
        self._received: list[memoryview] = []
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._pack)
        self._decoder = msgspec.msgpack.Decoder(AnyMessage, dec_hook=self._unpack)

    @abstractmethod
    def readable(self, seconds: float) -> bool:
        """Whether something, or the end, has arrived; waits up to `seconds` for it."""

    @abstractmethod
    def send_raw(self, data: bytes | memoryview) -> None:
        """Send all of the bytes. Raises PeerGoneError."""

    @abstractmethod
    def receive_raw(self, size: int) -> memoryview:
        """The next `size` bytes, in memory of their own. Raises PeerGoneError."""

    @abstractmethod
    def close(self) -> None:
        """Give up the connection."""

    def send(self, message: AnyMessage) -> None:
        self._sending = []
        header = self._encoder.encode(message)
        arrays, self._sending = self._sending, []
        sizes = [array.nbytes for array in arrays]
        self.torn = True
        self.send_raw(struct.pack(f"<QI{len(sizes)}Q", len(header), len(sizes), *sizes) + header)
        for array in arrays:
            self.send_raw(array.reshape(-1).view(np.uint8).data)
        self.torn = False

    def receive(self) -> AnyMessage:
        while not self.readable(PERIOD):
            self._check()
        self.torn = True
        header_size, num_buffers = struct.unpack("<QI", self.receive_raw(12))
        sizes = struct.unpack(f"<{num_buffers}Q", self.receive_raw(8 * num_buffers))
        header = self.receive_raw(header_size)
        self._received = [self.receive_raw(size) for size in sizes]
        self.torn = False
        try:
            return self._decoder.decode(header)
        finally:
            self._received = []

    def _pack(self, value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if not isinstance(value, np.ndarray):
            raise NotImplementedError(f"a {type(value).__name__} cannot be sent to a worker")
        if value.nbytes < INLINE_BYTES:
            return value.dtype.str, value.shape, value.tobytes()
        self._sending.append(np.ascontiguousarray(value))
        return value.dtype.str, value.shape, len(self._sending) - 1

    def _unpack(self, kind: type, packed: Any) -> Any:
        if kind is not np.ndarray:
            raise NotImplementedError(f"a {kind.__name__} cannot be received")
        dtype, shape, data = packed
        memory = self._received[data] if isinstance(data, int) else bytearray(data)  # both can be written to
        return np.frombuffer(memory, dtype).reshape(shape)


class SocketChannel(Channel):
    """A channel over a socket pair, which has no port and no file.

    It tells both ends at once when the other is gone, and the kernel holds a worker back that runs ahead of its reader.
    A parent needs `check` too: a forked grandchild of a dead worker may still hold the worker's end of the socket open.
    """

    def __init__(self, sock: socket.socket, check: Callable[[], None] = lambda: None):
        super().__init__(check)
        self._sock = sock
        sock.settimeout(PERIOD)

    def readable(self, seconds: float) -> bool:
        if self._sock.fileno() < 0:
            raise PeerGoneError
        poll = select.poll()  # a new one: an actor's threads wait side by side, which one object refuses
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(int(seconds * 1000)))

    def read(self, into: memoryview) -> int:
        """Read what has arrived, after a wait; returns the number of bytes. Raises PeerGoneError at the end."""
        while True:
            try:
                if count := self._sock.recv_into(into):
                    return count
                raise PeerGoneError
            except TimeoutError:
                self._check()
            except OSError as e:
                raise PeerGoneError from e

    def receive_raw(self, size: int) -> memoryview:
        data = view = np.empty(size, np.uint8).data  # numpy's memory: aligned, and not cleared first
        while view:
            view = view[self.read(view) :]
        return data

    def send_raw(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except TimeoutError:
                self._check()
            except OSError as e:
                raise PeerGoneError from e

    def close(self) -> None:
        self._sock.close()


def fits(config: dict[str, Any]) -> str | None:
    """Why a config cannot be sent to a worker; None when it can."""
    try:
        msgspec.msgpack.encode(config)
    except (TypeError, NotImplementedError) as e:
        return str(e)
    return None
