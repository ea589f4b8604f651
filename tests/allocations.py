"""What memory a computation holds, told by a dispatch mode; what an operation makes for itself alone is not seen."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationLog(TorchDispatchMode):
    """Notes each tensor storage that is made and freed, so that a step's peak memory can be told on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # number of the storage, + bytes when made, - bytes when freed
        self._numbers: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.number(tensor)
        return result

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._numbers:
            number, size = len(self.events), storage.nbytes()
            self._numbers[address] = number
            self.events.append((number, size))
            weakref.finalize(storage, self._freed, address, number, size)
        return self._numbers[address]

    def _freed(self, address: int, number: int, size: int) -> None:
        self.events.append((number, -size))
        if self._numbers.get(address) == number:
            del self._numbers[address]

    def largest(self, without: set[int]) -> int:
        """Bytes of the largest storage made."""
        return max(size for number, size in self.events if number not in without)

    def peak(self, without: set[int]) -> int:
        """Most bytes alive at once, without the storages of the given numbers."""
        alive = most = 0
        for number, size in self.events:
            if number not in without:
                alive += size
                most = max(most, alive)
        return most
