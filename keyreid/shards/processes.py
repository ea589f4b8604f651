"""The processes that pack and read: started from a clean server, never forked from a process that has threads."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def worker_context() -> ForkServerContext:
    """How workers are started.

    A child that is forked while a thread of its parent is inside OpenBLAS inherits the lock and waits for ever (seen: a
    reader's worker in a matrix product); training processes have many threads. The server has none, and imports what
    workers need once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["keyreid.shards.writer", "keyreid.shards.plain"])
    return context
