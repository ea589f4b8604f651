"""A table whose rows the ranks share out: row i is rank i % R's, as its (i // R)-th.

A step needs few rows. A rank asks their owners for them, and sends back what is to be added: what travels grows with
the rows that a rank needs, not with the table or the ranks.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from keyreid.distributed.ranks import Ranks

_BLOCK = 4096  # rows that are drawn at once; a multiple of 16, in which torch draws normal numbers


class Exchange:
    """Which rows this rank needs in a step, and which of its own the others need; a collective.

    Args:
        rows: int64 [n] on the CPU, in any order, repetitions among them.

    Attributes:
        place: int64 [n], of each among the `rows` different ones, u, that `fetch` gives.
        owned: int64 [o], rows of this rank's part that any rank needs.
    """

    def __init__(self, rows: Tensor, ranks: Ranks) -> None:
        wanted, place = rows.unique(return_inverse=True)
        order = (wanted % ranks.world_size).argsort(stable=True)
        wanted = wanted[order]
        self.place = order.argsort()[place].to(ranks.device)
        self._wanted = (wanted % ranks.world_size).bincount(minlength=ranks.world_size)
        self._asked = torch.empty_like(self._wanted)
        dist.all_to_all_single(self._asked, self._wanted, group=ranks.control)
        self._wanted, self._asked = self._wanted.tolist(), self._asked.tolist()
        self.rows = len(wanted)
        asked = torch.empty(sum(self._asked), dtype=torch.int64)
        dist.all_to_all_single(asked, wanted, self._asked, self._wanted, group=ranks.control)
        owned, to = (asked // ranks.world_size).unique(return_inverse=True)
        self._sent = (asked // ranks.world_size).to(ranks.device)
        self.owned, self._to = owned.to(ranks.device), to.to(ranks.device)

    def fetch(self, tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The rows that are needed, [u, W] of each table, from each rank's parts of them, [rows, W]; in one message."""
        sent = torch.cat([table[self._sent] for table in tables], 1)
        found = sent.new_empty(self.rows, sent.shape[1])
        dist.all_to_all_single(found, sent, self._wanted, self._asked)
        return found.split([table.shape[1] for table in tables], 1)

    def add(self, addends: Tensor) -> Tensor:
        """The sums of what all ranks have for this rank's `owned` rows: [u, W] -> [o, W]."""
        received = addends.new_empty(sum(self._asked), addends.shape[1])
        dist.all_to_all_single(received, addends.contiguous(), self._asked, self._wanted)
        return received.new_zeros(len(self.owned), addends.shape[1]).index_add_(0, self._to, received)


def own_rows(
    draw: Callable[[int, int], Tensor],
    tables: int,
    rows: int,
    width: int,
    ranks: Ranks,
    device: torch.device | str = "cpu",
) -> Tensor:
    """This rank's rows of tables that `draw(rows, width)` would draw one after the other, without ever holding one.

    Returns:
        float32 [tables, own rows, width].
    """
    own = torch.empty(tables, len(range(ranks.rank, rows, ranks.world_size)), width, device=device)
    for table in own:
        for start in range(0, rows, _BLOCK):
            block = draw(min(_BLOCK, rows - start), width)[(ranks.rank - start) % ranks.world_size :: ranks.world_size]
            first = len(range(ranks.rank, start, ranks.world_size))
            table[first : first + len(block)] = block
    return own
