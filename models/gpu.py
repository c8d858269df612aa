"""Run a network on a GPU in blocks of a fixed number of rows, so that transfers and products of blocks overlap.

The last bits of a matrix product depend on how many rows it has. Here it always has as many: a shorter block is filled
up with rows that nobody reads. So on one GPU, a row gets the same bits whatever rows it comes with. As all shapes are
fixed, the work of a block is recorded once, as a CUDA graph, and replayed; launching its kernels one by one takes three
times as long. What is computed is left to `models.inference`.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from schemas.models import Precision

GPU_BLOCK_ROWS = 4096
_SLOTS = 4  # blocks on their way at once

Compute = Callable[[Tensor], tuple[Tensor, ...]]
_settings = threading.Lock()  # of the precision of products, which torch keeps for the whole process


class Slot(Protocol):
    """Buffers and a queue of work for one block."""

    def start(self, rows: Tensor, results: Sequence[Tensor]) -> None:
        """Begin with rows `[n, D]`, n up to `GPU_BLOCK_ROWS`, and write each result, `[n, …]`."""

    def finish(self) -> None:
        """Wait until the results are written."""


class BlockPipeline:
    """Takes rows through several slots at once. Threads may share it; each waits only for its own blocks.

    Args:
        new_slot: makes a slot; called when all slots are busy, up to `slots` times.
        slots: the number of blocks on their way at once.
    """

    def __init__(self, new_slot: Callable[[], Slot], slots: int = _SLOTS) -> None:
        self._new_slot = new_slot
        self._free: SimpleQueue[Slot] = SimpleQueue()
        self._unmade = slots
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, results: Sequence[Tensor]) -> None:
        """Compute all rows of x `[n, D]` and write the results, each `[n, …]`."""
        running: deque[Slot] = deque()
        try:
            for start in range(0, len(x), GPU_BLOCK_ROWS):
                block = slice(start, start + GPU_BLOCK_ROWS)
                running.append(self._take(running))
                running[-1].start(x[block], [result[block] for result in results])
            for slot in running:
                slot.finish()
        finally:
            for slot in running:
                self._free.put(slot)

    def _take(self, running: deque[Slot]) -> Slot:
        """Return a free slot, else a new one, else the oldest of the caller's own, else wait for another thread's."""
        with contextlib.suppress(Empty):
            return self._free.get_nowait()
        with self._lock:
            if self._unmade:
                slot = self._new_slot()
                self._unmade -= 1
                return slot
        if not running:
            return self._free.get()
        running[0].finish()
        return running.popleft()


class GraphSlot(Slot):
    """A slot of the GPU: a stream of its own, on which a block is copied in, computed and copied out.

    Args:
        compute: from `[GPU_BLOCK_ROWS, D]` to results of as many rows; a row's results may depend on that row alone.
        dim: D.
        precision: of the products.
    """

    def __init__(self, compute: Compute, dim: int, precision: Precision) -> None:
        self._compute = compute  # the recording refers to the memory of its weights
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._staging = torch.empty(GPU_BLOCK_ROWS, dim, pin_memory=True)
        self._rows = torch.zeros(GPU_BLOCK_ROWS, dim, device="cuda")
        self._graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), products_in(precision):
            with torch.cuda.stream(self._stream):
                compute(self._rows)  # what a library sets up at its first call cannot be recorded
            # Recorded on the slot's own stream: graphs of one stream share a workspace and must not run side by side.
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._outputs = compute(self._rows)

    def start(self, rows: Tensor, results: Sequence[Tensor]) -> None:
        """Queue the block; results should be page-locked, rows are copied to such memory where they are not."""
        if not rows.is_pinned():
            rows = self._staging[: len(rows)].copy_(rows)
        with torch.cuda.stream(self._stream):
            self._rows[: len(rows)].copy_(rows, non_blocking=True)
            self._graph.replay()
            for result, output in zip(results, self._outputs, strict=True):
                result.copy_(output[: len(rows)], non_blocking=True)

    def finish(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()


@contextlib.contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Compute products on the GPU in this precision, whatever torch is set to, while kernels are launched or recorded.

    `"tf32"` cuts the factors of a product to 10 bits of mantissa, `"bf16"` to 7; sums are float32.
    """
    matmul = torch.backends.cuda.matmul
    with _settings:
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
                yield
        finally:
            matmul.fp32_precision = before
