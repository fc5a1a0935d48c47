"""Read ahead: run iterables in threads, a few items before they are needed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1


def ahead(streams: Iterable[Iterable[T]], threads: int, waiting: int) -> Generator[T, None, None]:
    """Yield the items of all streams. One of the threads runs each stream; with one thread, items keep their order.

    At most `waiting` items are ready at a time. An exception in a stream is raised here, after the items before it.
    Close the generator to stop the threads early.
    """
    jobs, lock = iter(streams), threading.Lock()
    ready: queue.Queue[T | BaseException | None] = queue.Queue(waiting)
    stopped = threading.Event()

    def put(item: T | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue

    def work() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    stream = next(jobs, None)
                if stream is None:
                    break
                for item in stream:
                    put(item)
                    if stopped.is_set():
                        break
        except BaseException as error:  # the consumer must see it, whatever it is
            put(error)
        put(None)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        while threads:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                threads -= 1
            else:
                yield item
    finally:
        stopped.set()
        for worker in workers:
            worker.join()
