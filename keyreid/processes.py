"""Worker processes: started clean, and ended with the process that started them."""

import multiprocessing
import os
import threading
from multiprocessing.context import ForkServerContext


def worker_context(*modules: str) -> ForkServerContext:
    """How workers are started: from a server that has imported `modules` once.

    A child that is forked while a thread of its parent is inside OpenBLAS inherits the lock and waits for ever (seen: a
    reader's worker in a matrix product); training processes have many threads, the server has none.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def end_with_parent(_worker: int = 0) -> None:
    """Called in a worker: end when the process that started it does, even by SIGKILL.

    Otherwise it waits for work for ever, and a packer left over from a killed run writes beside its successor.
    """
    threading.Thread(target=_wait_for_parent, name="keyreid-parent", daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
