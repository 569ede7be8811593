"""The pipeline of an offloaded step: the next chunk is brought and the previous one taken back while one is stepped.

Copies to and from a GPU run on two streams of their own and are ordered by events; reads and writes of a file run on two
threads. On CPU tensors the same code makes plain copies, or none where states lie in memory and are stepped there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fusedopt.backends.cpu import sparing_threads
from fusedopt.offloading.chunk import Chunk


class Streams:
    """The copy streams of a GPU: up to it, down from it. `current` is the stream that steps."""

    def __init__(self, device: torch.device):
        self.device = device
        self.up, self.down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def begin(self) -> None:
        self.current = torch.cuda.current_stream(self.device)
        self.up.wait_stream(self.current)
        self.down.wait_stream(self.current)


class _AtOnce:
    """An executor that does its work when it is asked to."""

    def submit(self, work, *args) -> Future:
        future: Future = Future()
        future.set_result(work(*args))
        return future


class Pipeline:
    """Copies of chunks around their steps."""

    def __init__(self):
        self._streams: dict[torch.device, Streams] = {}

    def run(self, chunks: list[Chunk], step: Callable[[Chunk], None]) -> None:
        """Brings, steps and takes back each chunk. Everything is in its place when it returns, except parameters that are
        still being copied up: the current stream waits for them."""
        in_file = any(c.in_file for c in chunks)
        for device in {c.device for c in chunks if c.device.type == "cuda"}:
            if device not in self._streams:
                self._streams[device] = Streams(device)
            self._streams[device].begin()
        buffers = {id(c.buffer): c.buffer for c in chunks if c.buffer is not None}
        # One chunk ahead where fetching waits for the buffer on this thread; a thread may wait for any free one.
        depth = max(1, len(buffers) - 1) if in_file else 1
        with contextlib.ExitStack() as stack:
            if in_file:
                stack.enter_context(sparing_threads(2))
            reader = stack.enter_context(ThreadPoolExecutor(1)) if in_file else _AtOnce()
            writer = stack.enter_context(ThreadPoolExecutor(1)) if in_file else _AtOnce()
            fetches: list[Future] = []
            busy: set[int] = set()
            for n, chunk in enumerate(chunks):
                while len(fetches) < min(len(chunks), n + 1 + depth):
                    ahead = chunks[len(fetches)]
                    if id(ahead.buffer) in busy:
                        break
                    if ahead.buffer is not None:
                        busy.add(id(ahead.buffer))
                    fetches.append(reader.submit(self._fetch, ahead))
                self._arrived(chunk, fetches[n].result())
                step(chunk)
                if chunk.buffer is not None:
                    stepped = self._record(chunk, "current")
                    chunk.buffer.flushed = writer.submit(self._flush, chunk, stepped)
                    busy.discard(id(chunk.buffer))
            for buffer in buffers.values():
                if buffer.flushed is not None:
                    buffer.flushed.result()
        for chunk in chunks:
            self._finish(chunk)

    # Streams and events; nothing on a CPU

    def _on(self, chunk: Chunk, name: str):
        streams = self._streams.get(chunk.device)
        return contextlib.nullcontext() if streams is None else torch.cuda.stream(getattr(streams, name))

    def _record(self, chunk: Chunk, name: str) -> torch.cuda.Event | None:
        streams = self._streams.get(chunk.device)
        return None if streams is None else getattr(streams, name).record_event()

    def _arrived(self, chunk: Chunk, fetched: torch.cuda.Event | None) -> None:
        """Makes who steps the chunk wait for it: the CPU itself, or the stream."""
        if fetched is None:
            return
        if chunk.streams:
            fetched.synchronize()
        else:
            self._streams[chunk.device].current.wait_event(fetched)

    def _finish(self, chunk: Chunk) -> None:
        buffer = chunk.buffer
        if buffer is None or chunk.device not in self._streams:
            return
        if chunk.streams:
            self._streams[chunk.device].current.wait_stream(self._streams[chunk.device].up)
        elif buffer.done is not None:
            buffer.done.synchronize()

    # What is moved

    @torch.no_grad()
    def _fetch(self, chunk: Chunk) -> torch.cuda.Event | None:
        buffer = chunk.buffer
        if buffer is None:
            return None
        buffer.wait()
        if chunk.in_file:
            chunk.segment.load(buffer.host)
        if chunk.device_room:
            source = buffer.host if chunk.in_file else chunk.segment.bytes
            with self._on(chunk, "up"):
                buffer.device[: chunk.nbytes].copy_(source[: chunk.nbytes], non_blocking=True)
            return self._record(chunk, "up")
        if chunk.streams:
            with self._on(chunk, "down"):
                for j, read in zip(chunk.live, chunk.reads_params(), strict=True):
                    chunk.grads[j].copy_(chunk.params[j].grad, non_blocking=True)
                    if read:
                        chunk.stepped[j].copy_(chunk.params[j], non_blocking=True)
            return self._record(chunk, "down")
        return None

    @torch.no_grad()
    def _flush(self, chunk: Chunk, stepped: torch.cuda.Event | None) -> None:
        buffer = chunk.buffer
        if chunk.device_room:
            target = buffer.host if chunk.in_file else chunk.segment.bytes
            if stepped is not None:
                self._streams[chunk.device].down.wait_event(stepped)
            with self._on(chunk, "down"):
                target[: chunk.nbytes].copy_(buffer.device[: chunk.nbytes], non_blocking=True)
            buffer.done = self._record(chunk, "down")
            if chunk.in_file and buffer.done is not None:
                buffer.done.synchronize()
        if chunk.streams:
            with self._on(chunk, "up"):
                for j in chunk.live:
                    chunk.params[j].copy_(chunk.stepped[j], non_blocking=True)
            buffer.done = self._record(chunk, "up")
        if chunk.in_file:
            chunk.segment.save(buffer.host)
