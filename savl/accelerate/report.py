"""The report of `savl.accelerate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

from savl.accelerate.adapter import Calls


@dataclass(frozen=True)
class BlockReport:
    """The result of `savl.accelerate` for one block."""

    name: str
    """Name of the module in the network, as in `torch.nn.Module.named_modules`."""
    kind: str
    """Name of the block's class."""
    served: str | None
    """What serves it, such as "Swin block: window 8, 6 heads of 30"; None if it was left as it is."""
    reason: str | None = None
    """Why it was left as it is."""
    closeness: float | None = None
    """The largest error found by the verification, divided by the allowed error (`savl.ops.equivalence`).

    It is at most 1 if the block was replaced. It is larger or infinite if the verification failed, and None if the
    block was not verified.
    """
    calls: Calls = field(default_factory=Calls)
    """Numbers of calls since `savl.accelerate` was called, outside of compiled programs."""

    @property
    def text(self) -> str:
        """What the report says of the block."""
        if self.served is None:
            return f"left as it is: {self.reason}"
        error = "not verified" if self.closeness is None else f"error: {self.closeness:.0%} of the tolerance"
        return f"{self.served} ({error})"


class AccelerationReport:
    """What `savl.accelerate` has done to a network, block by block.

    Attributes:
        network: Name of the network's class.
        blocks: The blocks, in the order of the network's modules.
        layers: Single layers outside of the blocks, likewise.
    """

    def __init__(
        self, network: str, blocks: list[BlockReport], layers: list[BlockReport], undo: Callable[[], None]
    ) -> None:
        self.network = network
        self.blocks = blocks
        self.layers = layers
        self._undo = undo

    @property
    def served(self) -> int:
        """Number of blocks that savl's ops compute."""
        return sum(block.served is not None for block in self.blocks)

    def undo(self) -> None:
        """Restore the original blocks, and the dtype of the network if `savl.accelerate` changed it.

        Without ``dtype=``, the weights are not changed. With it, the original parameters are restored, and changes
        made to the weights after the conversion are discarded. Copies of the network are not changed.
        """
        self._undo()

    def calls(self) -> tuple[int, Counter[str]]:
        """Return how many calls of blocks were served since `savl.accelerate`, and how many fell back, by reason."""
        fallen_back: Counter[str] = Counter()
        for block in self.blocks:
            fallen_back.update(block.calls.fallen_back)
        return sum(block.calls.served for block in self.blocks), fallen_back

    def __str__(self) -> str:
        if not self.blocks:
            return f"{self.network}: no block with windowed attention was found"
        lines = [f"{self.network}: {self.served} of {len(self.blocks)} blocks are computed by savl's ops"]
        for group in (self.blocks, self.layers):
            lines.extend(_lines(group))
        served, fallen_back = self.calls()
        if served or fallen_back:
            lines.append(f"  calls: {served} served, {fallen_back.total()} by the original blocks")
            lines.extend(f"    {count} x {reason}" for reason, count in fallen_back.most_common())
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.served} of {len(self.blocks)} blocks of {self.network}>"


def _lines(blocks: list[BlockReport]) -> list[str]:
    """Return a line for each kind of block, with the least favourable proof."""

    def kind(block: BlockReport) -> tuple[str, str, str]:
        return block.kind, block.served or "", block.reason or ""

    lines = []
    for (name, *_), members in groupby(sorted(blocks, key=kind), key=kind):
        each = list(members)
        lines.append(f"  {len(each)} x {name}: {max(each, key=lambda block: block.closeness or 0).text}")
    return lines
