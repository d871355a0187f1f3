"""DeviceArena: an `Arena` whose bytes live on an accelerator. Same addresses, same wire order, same callers.

Codec threads read and write host bytes; the engine's kernels read and write device bytes. Two streams meet here:

    engine stream   | kernels of layers [0, 5) | event | kernels of layers [5, 10) | event | ...
    copy stream                                  \\--wait--> gather -> host             one per codec thread

A read waits, on the device, for the newest event: it was recorded no earlier than the KV that the read is about was
announced (`mark_computed` comes before `on_layers`). A write returns only once it is on the device, so whoever is told
that a frame is in memory may launch a kernel that reads it. Columns change hands between two steps, and a step ends
with its stream idle, so no kernel of an earlier owner is still under way.

On "cpu" the same code runs without streams; that is how it is tested where there is no accelerator.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.base import limits
from engine.kv.arena import Arena, Bytes, Range
from engine.kv.schema import CacheSchema


class DeviceArena(Arena):
    """KV memory on `device`: `bytes_CLHPSX` is a torch tensor of uint8.

    Behind the last column lies one that nobody is ever given (`spare_column`): a captured graph has more rows than a
    step has sequences, and the rows that stand for nobody write there.
    """

    def __init__(
        self,
        schema: CacheSchema,
        *,
        columns: int,
        block_size: int = limits.BLOCK_SIZE_TOKENS,
        device: torch.device | str = "cuda",
    ) -> None:
        self.device = torch.device(device)
        self._computed: Any = None  # the newest event on the engine's stream
        self._local = threading.local()  # a copy stream per codec thread: they do not wait for each other
        super().__init__(schema, columns=columns, block_size=block_size)

    def _new_memory(self, shape: tuple[int, ...]) -> torch.Tensor:
        columns, *column = shape
        return torch.zeros((columns + 1, *column), dtype=torch.uint8, device=self.device)

    @property
    def spare_column(self) -> int:
        return self.columns

    @property
    def array(self) -> Bytes:
        """A host copy of every column: for tests and for nothing else."""
        array: Bytes = self.bytes_CLHPSX[: self.columns].cpu().numpy()
        return array

    def mark_computed(self) -> None:
        """On the engine thread: all KV that kernels launched so far will write may be read behind this point."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            self._computed = event

    # -- tokens --------------------------------------------------------------------------------------------------------
    def read(
        self,
        table: Sequence[int],
        layers: Range,
        tokens: Range,
        heads: Range | None = None,
        into: memoryview | None = None,
    ) -> Bytes:
        row_tokens, index_LHPR = self._address(table, layers, tokens, heads)
        shape = (*index_LHPR.shape[:3], tokens[1] - tokens[0], self._head_bytes)
        size = int(np.prod(shape))
        host = np.empty(size, np.uint8) if into is None else np.frombuffer(into, np.uint8)
        with self._copying():
            gathered = self._device_rows(row_tokens).index_select(0, self._to_device(index_LHPR))
            torch.from_numpy(host).copy_(gathered.view(-1))  # to pageable memory: returns when it is there
        return host.reshape(shape)

    def write(self, table: Sequence[int], layers: Range, tokens: Range, heads: Range | None, data_LHPTX: Bytes) -> None:
        row_tokens, index_LHPR = self._address(table, layers, tokens, heads)
        self._require_data(data_LHPTX, (*index_LHPR.shape[:3], tokens[1] - tokens[0], self._head_bytes))
        rows = self._device_rows(row_tokens)
        with self._copying():
            host = np.require(data_LHPTX, requirements=("C", "W"))  # torch will not look at read-only memory
            data = torch.from_numpy(host).view(-1, rows.shape[1]).to(self.device)
            rows.index_copy_(0, self._to_device(index_LHPR), data)

    # -- whole columns -------------------------------------------------------------------------------------------------
    def copy_column(self, source: int, target: int) -> None:
        super().copy_column(source, target)
        self.mark_computed()  # a choice that is to leave at once is read from the column that is being copied

    def _fill(self, columns: Sequence[int], value: int) -> None:
        self._require_columns(columns)
        self.bytes_CLHPSX[torch.tensor(columns, dtype=torch.long, device=self.device)] = value

    # -- streams -------------------------------------------------------------------------------------------------------
    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Work on this thread's copy stream, behind what is computed, done when the block is left."""
        if self.device.type != "cuda":
            yield
            return
        stream = self._copy_stream()
        with torch.cuda.stream(stream):
            if self._computed is not None:
                stream.wait_event(self._computed)
            yield
        stream.synchronize()

    def _copy_stream(self) -> Any:
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._local.stream

    def _device_rows(self, row_tokens: int) -> torch.Tensor:
        rows: torch.Tensor = self.bytes_CLHPSX.view(-1, row_tokens * self._head_bytes)
        return rows

    def _to_device(self, index: npt.NDArray[np.intp]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(index).reshape(-1)).to(self.device)
