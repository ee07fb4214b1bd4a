"""Decide which tiles of an upscaler are computed by CUDA graphs if the caller has not decided.

Tiles whose shape occurs several times in an image are. The first tile of a shape is computed as without graphs, which
compiles Triton kernels and lets libraries choose algorithms; the second is recorded, and recording computes nothing on
the GPU. Graphs therefore cost no pass over the network, and they never make a call fail that succeeds without them: if
the network cannot be recorded or memory runs out, its tiles are computed as without graphs from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from savl.inference.graphs import GraphCache
from savl.out_of_memory import is_out_of_memory

LEAST_TILES = 2
"""Least number of tiles of one shape in an image for which a graph is recorded."""


def has_hooks(network: nn.Module) -> bool:
    """Return whether a forward pass calls hooks, which a replay would not call."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class AutomaticGraphs:
    """The decision for one upscaler, and why graphs are not used any more. Threads may share it."""

    def __init__(self, *, trusted: bool) -> None:
        """Begin with graphs allowed.

        Args:
            trusted: Whether a replay of the network is known to give the results of the network. If not, the first
                replay is compared with them, because a network that changes its state in Python can be recorded, but
                would compute something else later.
        """
        self.reason: str | None = None
        """Why graphs are not used any more; None while they are allowed."""
        self._trusted = trusted

    def run(
        self,
        graphs: GraphCache,
        key: Hashable,
        *,
        repeated: bool,
        computed: set[Hashable],
        compute: Callable[[], Tensor],
        replay: Callable[[], Tensor],
    ) -> Tensor:
        """Compute a tile by a graph if that is allowed and worthwhile, else without one.

        Args:
            graphs: The graphs.
            key: That of the tile.
            repeated: Whether the image has several tiles with this key.
            computed: Keys of the tiles of the image that were computed without a graph; changed in place.
            compute: Function that computes the tile without a graph.
            replay: Function that computes it with the graph of ``key``, which is recorded first if there is none. The
                recording needs no warm-up.

        Raises:
            Exception: An exception of ``compute``. If memory ran out, it did without graphs in memory.
        """
        recorded = key in graphs
        if self.reason is None and (recorded or (repeated and key in computed)):
            result = self._replayed(graphs, compute, replay)
            if result is not None:
                return result
        computed.add(key)
        if len(graphs) == 0:
            return compute()
        try:
            return compute()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block, whose traceback keeps the tensors of the failed call alive.
        self.turn_off(graphs, "memory ran out beside the recorded graphs")
        return compute()

    def turn_off(self, graphs: GraphCache, reason: str) -> None:
        """Use no graphs any more, and free the memory of those that were recorded."""
        self.reason = self.reason or reason
        graphs.clear()

    def _replayed(
        self, graphs: GraphCache, compute: Callable[[], Tensor], replay: Callable[[], Tensor]
    ) -> Tensor | None:
        """Return the result of a graph, or None after turning graphs off."""
        try:
            result = replay()
            if self._trusted or torch.equal(result, compute()):
                self._trusted = True
                return result
            reason = "a replay of this network gives another result than the network"
        except Exception as error:  # of many kinds; an error of the network itself is raised again without graphs
            reason = "memory ran out" if is_out_of_memory(error) else str(error).partition("\n")[0]
        self.turn_off(graphs, reason)
        return None
