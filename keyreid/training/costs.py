"""What heads and losses of a step cost a rank: what it receives from others, and its memory beside the features.

Formulas of a configuration's shapes alone; tests/test_costs.py counts the same, benchmarks/scaling.py makes seconds of
them. S clips of a scope lie on G of R ranks, n on each; F = D + P*T*D numbers are a clip's features.
"""

from typing import Literal, NamedTuple

from keyreid.config import Config
from keyreid.distributed.share import ranks_of_scope
from keyreid.guidance import named

TERMS = 9  # of which a step sums up: three of each branch, attention, accuracy, their total
BLOCK = 256  # see keyreid/triplet.py


class Message(NamedTuple):
    """A collective of a step.

    Attributes:
        kind: gather: each rank's bytes to all others. sum: over the ranks. exchange: to and from the rows' owners.
        ranks: that take part.
        size: bytes that a rank gives to a gather, that a sum has, or of all rows that a rank gets in an exchange.
    """

    what: str
    kind: Literal["gather", "sum", "exchange"]
    ranks: int
    size: int

    @property
    def received(self) -> int:
        """Bytes whose values a rank hears; a ring moves up to twice a sum's, and its own rows stay with an owner."""
        return self.size * (self.ranks - 1) if self.kind == "gather" else self.size


class Layout(NamedTuple):
    """How a step's clips lie.

    Attributes:
        clips: n, of a rank.
        ranks: R.
        together: G, ranks that hold a scope.
        scope: S, clips of a scope.
        own: of them, a rank's.
        at_once: clips whose losses a rank computes in one pass.
    """

    clips: int
    ranks: int
    together: int
    scope: int
    own: int
    at_once: int

    @classmethod
    def of(cls, config: Config, ranks: int) -> "Layout":
        """That of a configuration; ConfigError where the ranks and the lanes do not go together."""
        config.check_ranks(ranks)
        together = ranks_of_scope(config.scopes, ranks, f"data.lanes={config.data.lanes}")
        clips, scope = config.data.batch_size // ranks, config.data.batch_size // config.scopes
        micro = config.training.accumulation
        whole = together == 1 and clips // scope % micro == 0
        return cls(clips, ranks, together, scope, scope // together, clips // micro if whole else clips)


def messages(config: Config, width: int, ranks: int) -> list[Message]:
    """All collectives of a step's heads and losses, in order; none on one rank.

    Args:
        width: D of the network.
    """
    if ranks == 1:
        return []
    layout, parts = Layout.of(config, ranks), config.model.parts
    clips, together = layout.clips, layout.together
    visible = named(config.model.guidance).uses_visibility
    widths = width, parts * config.clip.frames * width
    found = [Message("parts seen", "sum", ranks, 4 * parts)] if visible else []
    lent, tables = config.scopes > 1, parts if config.loss.centres == "all" else 0
    rows = -(-clips // config.data.tracklets)  # identities of a rank
    if lent:
        found += [Message("how many centres", "exchange", ranks, 8 * ranks)]
        found += [Message("which centres", "exchange", ranks, 8 * rows)]
        fetched = width + (tables or 1) * config.clip.frames * width
        found += [Message("centres", "exchange", ranks, 4 * rows * fetched)]
    if together > 1:
        sums = [Message("statistics", "sum", together, 4 * of) for of in widths for _ in ("mean", "variance")]
        wire = 2 if config.training.precision == "bf16" else 4
        per_clip = *(wire * of for of in (*widths, config.clip.frames)), *[4 * parts] * visible, 8
        gathered = [Message("features", "gather", together, clips * of) for of in per_clip]
        pairs = [Message("pairs", "gather", together, clips * n * of) for n in (1, parts) for of in (16, 8)]
        found += [*sums, *gathered, *pairs, *sums]  # the gradients of the statistics' sums are sums
    found += [Message("terms", "sum", ranks, 4 * TERMS)]
    found += [Message("running statistics", "sum", ranks, 8 * of) for of in widths]
    if lent:
        moved = width + 1 + tables * (config.clip.frames * width + 1)
        found += [Message("centres' moves", "exchange", ranks, 4 * rows * moved)]
    return found


def memory(config: Config, width: int, identities: int, ranks: int) -> dict[str, int]:
    """A bound, in bytes, of what a rank holds at once for heads and losses beside its features and their gradients.

    Args:
        width: D of the network.
        identities: C; every rank has all classes.

    Returns:
        What is held, by name; their sum is the bound.
    """
    layout, parts = Layout.of(config, ranks), config.model.parts
    part_width, across = config.clip.frames * width, layout.together > 1
    of_clip = 4 * (width + parts * part_width)
    branches = 1 if across else parts  # whose distances are there at once
    wire = of_clip // 2 if config.training.precision == "bf16" else of_clip
    known = 4 * config.clip.frames + 4 * parts + 8
    rows = layout.own if across else layout.scope
    logits = 4 * (1 + parts) * layout.at_once * identities
    losses = {
        "own rows": 6 * layout.at_once * of_clip,
        "logits": 4 * logits,
        "distances": 24 * branches * rows * layout.scope,
        "float64": 8 * branches * (rows + min(BLOCK, layout.scope)) * part_width,
    }
    moves = {"centres' moves": 8 * part_width * (layout.scope if across and config.scopes == 1 else layout.clips)}
    gathered = {"gathered features": layout.scope * (wire + known)} if across else {}
    return gathered | max(losses, moves, key=lambda held: sum(held.values()))


def described(config: Config, width: int, identities: int, ranks: int) -> str:
    """Both in one line, for people."""
    held, sent = memory(config, width, identities, ranks), messages(config, width, ranks)
    most = max(held, key=held.get)
    return (
        f"heads and losses: at most {sum(held.values()) / 1e6:,.1f} MB a rank beside its features ({most}: "
        f"{held[most] / 1e6:,.1f}), {sum(of.received for of in sent) / 1e6:,.1f} MB received a step "
        f"in {len(sent)} collectives, on {ranks} rank(s)"
    )
