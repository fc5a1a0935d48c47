"""Read ahead: run iterables or calls in threads, a few items before they are needed."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

A = TypeVar("A")
T = TypeVar("T")
POLL_SECONDS = 0.1
MOST_THREADS = 8  # each may hold a decoded picture of a few hundred MiB


def ahead(streams: Iterable[Iterable[T]], threads: int, waiting: int) -> Generator[T, None, None]:
    """Yield the items of all streams. Each stream runs in one of the threads; with one thread, items keep their order.

    An exception in a stream is raised here, after the items that the stream yielded before it. Close the generator to
    stop the threads early.

    Args:
        waiting: how many items may be ready at a time. Each thread holds one more while it waits for a free place.
    """
    reader = _Reader(streams, waiting)
    workers = [threading.Thread(target=reader.work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    running = threads
    try:
        while running:
            item = reader.ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        reader.stopped.set()
        for worker in workers:
            worker.join()


class _Reader(Generic[T]):
    """The streams that the threads share, and the items that are ready.

    Attributes:
        ready: items, exceptions, and a None for each thread that has ended.
    """

    def __init__(self, streams: Iterable[Iterable[T]], waiting: int):
        self.streams, self.lock = iter(streams), threading.Lock()
        self.ready: queue.Queue[T | BaseException | None] = queue.Queue(waiting)
        self.stopped = threading.Event()

    def work(self) -> None:
        """Run one stream after another, until none is left or the consumer stops."""
        try:
            while not self.stopped.is_set():
                with self.lock:
                    stream = next(self.streams, None)
                if stream is None:
                    break
                for item in stream:
                    self._put(item)
                    if self.stopped.is_set():
                        break
        except BaseException as error:  # the consumer must see it, whatever it is
            self._put(error)
        self._put(None)

    def _put(self, item: T | BaseException | None) -> None:
        while not self.stopped.is_set():  # a plain put would wait for ever once the consumer has stopped
            try:
                return self.ready.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue


def in_order(work: Callable[[A], T], items: Iterable[A]) -> Generator[T, None, None]:
    """Yield the results of a call for each item, in the order of the items; the calls run in one thread for each core.

    An exception in a call is raised here, in place of its result. Close the generator to stop early.
    """
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)
    begun: deque[Future[T]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
