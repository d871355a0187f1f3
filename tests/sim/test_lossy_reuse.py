"""Lossy KV never answers for exact KV, nor for another loss (DESIGN 4), end to end: any byte of it changes the tokens.

A codec that exists only here keeps as many bits of every byte as its tables say for a level. Whoever asks for exact KV
after somebody has used it must get the one right answer, on every worker that the lossy KV has come to.
"""

from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest

from control_plane.router.requests import Ended, Submit, TokensReady
from engine.executors.oracle import reference_tokens
from engine.kv.arena import Bytes
from engine.kv.schema import Stream
from engine.types import Role, SamplingParams
from kv_transfer.codecs import Atom, AtomShape, Payload, codecs
from kv_transfer.profile import Point, Profile, Tables
from tests.sim.cluster import VirtualCluster
from tests.sim.processes import ORACLE, Shape, WorkerShape
from tests.sim.weather import Noise, Weather

PROMPT = tuple(range(1, 43))  # five full blocks and a part of one
SAMPLING = SamplingParams(temperature=0.0, max_tokens=24)
PATIENCE_US = 20_000_000


class Blur:
    """Keeps the uppermost bits of each byte."""

    paper: ClassVar[str] = "none: a test's"
    loses: ClassVar[str] = "the lowest bits"
    needs: ClassVar[tuple[str, ...]] = ()
    composes_with: ClassVar[str] = "nothing"
    lossless: ClassVar[bool] = False
    profiled: ClassVar[bool] = True
    dtypes: ClassVar[frozenset[str]] = frozenset({"uint8"})
    levels: ClassVar[tuple[int, ...]] = (0, 1)
    token_multiple: ClassVar[int] = 1
    block_local: ClassVar[bool] = True
    cuts_layers: ClassVar[bool] = True
    cuts_heads: ClassVar[bool] = True

    def __init__(self, tables: Tables, stream: Stream) -> None:
        self._bits = tables.arrays["bits"].tolist()

    def encode(self, atom: Atom, level: int) -> Payload:
        bits_NB = np.unpackbits(atom.bytes_LHPTX.reshape(-1, 1), axis=1)
        return np.packbits(bits_NB[:, : self._bits[level]]).data

    def decode_untrusted(self, payload: memoryview, shape: AtomShape, level: int) -> Bytes:
        bits = self._bits[level]
        bits_NB = np.unpackbits(np.frombuffer(payload, np.uint8), count=shape.raw_bytes * bits).reshape(-1, bits)
        return np.packbits(bits_NB, axis=1).reshape(shape.LHPTX)

    def payload_bytes_max(self, shape: AtomShape) -> int:
        return shape.raw_bytes // 2

    def error_bound(self, shape: AtomShape, level: int, largest: float) -> float:
        return 2.0 ** (8 - self._bits[level])


PROFILE = Profile(
    model=ORACLE.schema.model,
    tables={"blur": Tables({"bits": np.array([4, 2])})},
    curves={
        "blur": [
            Point(level=level, bits_per_element=bits, kl=kl, ppl_change=0.0, encode_mb_s=1.0, decode_mb_s=1.0)
            for level, bits, kl in ((0, 4.0, 0.002), (1, 2.0, 0.01))
        ]
    },
)
FINE, COARSE = {"codec": "blur", "kl_budget": 0.002}, {"codec": "blur"}
EXACT_KV = {"codec": "raw"}


@pytest.fixture(autouse=True)
def blur() -> Iterator[None]:
    codecs.names()  # the package's own are found first
    with patch.dict(codecs._registered, {"blur": Blur}):
        yield


class Client:
    """Asks one thing after the other."""

    def __init__(self, *decode_names: str) -> None:
        names = {"p0": Role.PREFILL} | dict.fromkeys(decode_names, Role.DECODE)
        workers = tuple(WorkerShape(name=name, roles=frozenset({role}), columns=60) for name, role in names.items())
        self.outputs: list[Any] = []
        weather = Weather(Random(1), Noise())
        self.cluster = VirtualCluster(1, Shape(workers=workers, profile=PROFILE), weather, self.outputs.append)
        self.cluster.world.run(until_us=200_000)

    def ask(
        self, wish: Mapping[str, Any], *, until: Callable[[], bool] | None = None
    ) -> tuple[tuple[int, ...], Ended | None]:
        """All tokens and the end; or those there are when something has happened."""
        key = sum(isinstance(output, Ended) for output in self.outputs) + 1
        self.cluster.submit(Submit(key=key, token_ids=PROMPT, sampling=SAMPLING, **wish))
        self._run(until or (lambda: self._ended(key) is not None))
        return self._tokens(key), self._ended(key)

    def finish(self, key: int) -> tuple[int, ...]:
        self._run(lambda: self._ended(key) is not None)
        return self._tokens(key)

    def running(self, name: str, count: int) -> bool:
        (worker,) = (process for process in self.cluster.workers if process.name == name)
        assert worker.engine is not None
        return worker.engine.core.load().running == count

    def _run(self, until: Callable[[], bool]) -> None:
        assert self.cluster.world.run(until_us=self.cluster.world.now_us + PATIENCE_US, until=until), "never happened"

    def _tokens(self, key: int) -> tuple[int, ...]:
        of_key = (output for output in self.outputs if isinstance(output, TokensReady) and output.key == key)
        return tuple(token for output in of_key for token in output.token_ids)

    def _ended(self, key: int) -> Ended | None:
        return next((output for output in self.outputs if isinstance(output, Ended) and output.key == key), None)


@pytest.fixture
def right() -> tuple[int, ...]:
    return reference_tokens(PROMPT, "", SAMPLING, SAMPLING.max_tokens, ORACLE)


def test_exact_kv_is_not_taken_from_a_lossy_request(right: tuple[int, ...]) -> None:
    client = Client("d1")
    lossy, ended = client.ask(COARSE)
    assert lossy[0] == right[0] and lossy != right, "a codec that loses nothing proves nothing"
    assert ended is not None and (ended.stats.codec, ended.stats.level) == ("blur", 1)
    exact, ended = client.ask(EXACT_KV)
    assert exact == right
    assert ended is not None and ended.stats.skipped_tokens == 0


def test_a_lossy_request_is_served_from_the_same_loss_and_from_exact_kv(right: tuple[int, ...]) -> None:
    client = Client("d1")
    first, _ = client.ask(COARSE)
    second, ended = client.ask(COARSE)
    assert second == first
    assert ended is not None and ended.stats.skipped_tokens == 40
    client.ask(EXACT_KV)
    _, ended = client.ask(COARSE)
    assert ended is not None and ended.stats.skipped_tokens == 40


def test_one_loss_is_not_taken_for_another() -> None:
    """Each level's answer is what it would be alone, and whoever comes again finds its own KV."""
    alone = {str(wish): Client("d1").ask(wish)[0] for wish in (FINE, COARSE)}
    assert len(set(alone.values())) == 2
    client = Client("d1")
    for wish, level, skipped in ((COARSE, 1, 0), (FINE, 0, 0), (COARSE, 1, 40), (FINE, 0, 40)):
        tokens, ended = client.ask(wish)
        assert tokens == alone[str(wish)]
        assert ended is not None
        assert (ended.stats.codec, ended.stats.level, ended.stats.skipped_tokens) == ("blur", level, skipped)
        assert ended.stats.kv_bytes_wire < ended.stats.kv_bytes_raw or skipped


def test_lossy_kv_that_has_moved_raw_is_lossy_where_it_came_to(right: tuple[int, ...]) -> None:
    client = Client("d1", "d2")
    client.ask(COARSE, until=lambda: client.running("d1", 1) or client.running("d2", 1))
    first = "d1" if client.running("d1", 1) else "d2"
    other = "d2" if first == "d1" else "d1"
    client.cluster.drain(first, 0)
    client._run(lambda: client.running(other, 1))
    assert client.finish(1) != right
    for _ in range(2):  # wherever they are placed, and whatever is cached there by now
        assert client.ask(EXACT_KV)[0] == right
