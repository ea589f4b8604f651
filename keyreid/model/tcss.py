"""Temporal clip shift and shuffle (TCSS): the order in which the local branch meets its rows."""

import torch

from keyreid.config import TcssConfig


def row_order(rows: int, tcss: TcssConfig) -> torch.Tensor:
    """Positions of the rows after TCSS.

    The first `shift` rows move to the end, the sequence is cut into `groups` equal parts, and the parts are
    interleaved: 128 rows with shift 4 and 2 groups give 4, 68, 5, 69, ... Where the groups do not divide the rows, the
    last row but one of the shifted sequence is repeated until they do (once for 2 groups, as in the published code).

    Args:
        rows: N, the number of rows.
        tcss: on/off, shift, groups.

    Returns:
        int64 [N'], positions from 0; N' = N rounded up to a multiple of `groups`, or N where TCSS is off.
    """
    order = torch.arange(rows)
    if not tcss.enabled:
        return order
    order = order.roll(-tcss.shift)
    missing = -rows % tcss.groups
    order = torch.cat([order, order[-2:-1].expand(missing) if rows > 1 else order.expand(missing)])
    return order.view(tcss.groups, -1).T.flatten()
