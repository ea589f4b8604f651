"""Worker processes that do not outlive who started them."""

from __future__ import annotations

import multiprocessing
import os
import threading


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
