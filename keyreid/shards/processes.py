"""The processes that pack and read: started from a clean server, never forked from a process that has threads."""

from __future__ import annotations

import multiprocessing
import os
import threading
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


def end_with_parent() -> None:
    """Called in a worker: end when the process that started it does, even by SIGKILL.

    Otherwise it waits for work for ever, and a packer left over from a killed run writes beside the one that goes on.
    """
    threading.Thread(target=_wait_for_parent, name="keyreid-parent", daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
