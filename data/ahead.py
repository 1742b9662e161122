"""Work ahead in threads, results in order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Generator[Result, None, None]:
    """`work` of each item, in the order of the items, at most `ahead` of them begun before their result is taken.

    With one thread nothing is done ahead. What `work` raises is raised in the item's turn; what has not begun by then, or
    when the results are wanted no longer, is not done.
    """
    if threads == 1:
        yield from map(work, items)
        return
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def prefetch(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, made by a background thread up to `depth` ahead; its exceptions are raised here."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                if not _offer(ready, (item, None), stopped):
                    return
            _offer(ready, (None, StopIteration()), stopped)
        except BaseException as error:
            _offer(ready, (None, error), stopped)

    threading.Thread(target=fill, daemon=True, name="darkroom-prefetch").start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()


def _offer(ready: queue.Queue, entry: tuple, stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            ready.put(entry, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False
