"""Where the patches of a Qwen3-VL image are, and their position embeddings, in closed forms of the image's grid.

transformers computes both in loops over images, whose lengths depend on values, and hands them over under names that
have changed from release to release. Here all images of a call have one grid, so that both are arithmetic on
0, 1, ... patches - 1, and a traced graph takes images of any size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Patches:
    """The patches of images, or of videos' frames, of one size.

    They come in blocks of merge x merge patches that one token is made of: blocks row by row, and patches within a
    block row by row.
    """

    def __init__(self, grid: Tensor, count: int, merge: int) -> None:
        """grid [images, 3] int64: frames, rows and columns in patches; rows and columns are alike in all images, and
        multiples of `merge`. count: patches of all frames together.
        """
        self.rows, self.columns = grid[0, 1], grid[0, 2]
        differences = grid[:, 1:] - grid[:1, 1:]
        unlike = (differences * differences).max()
        #: patches of a frame, [] int64; where grids are not alike more than there are, so that no graph takes them for
        #: such a frame. Grids are an input, and a division by zero may end the process
        self.per_frame = (self.rows * self.columns + unlike * count).clamp(min=1)
        across = (self.columns // merge).clamp(min=1)
        place = torch.arange(count, device=grid.device) % self.per_frame
        block, inside = place // merge**2, place % merge**2
        #: of every patch in its frame, [count] int64
        self.row = block // across * merge + inside // merge
        self.column = block % across * merge + inside % merge

    def interpolated(self, table: Tensor) -> Tensor:
        """Position embeddings [count, hidden] in fp32 of a square table [side * side, hidden] that is stretched to the
        frames' size: bilinear, corners on corners.
        """
        side = round(table.shape[0] ** 0.5)
        added = None
        for row, row_weight in _neighbours(self.row, self.rows, side):
            for column, column_weight in _neighbours(self.column, self.columns, side):
                part = F.embedding(row * side + column, table) * (row_weight * column_weight)[:, None]
                added = part if added is None else added + part
        assert added is not None
        return added

    def angles(self, frequencies: Tensor) -> Tensor:
        """Of rotary position embedding, [count, 2 * F] in fp32: by the row, then by the column, at frequencies [F]."""
        return torch.cat([place.float()[:, None] * frequencies for place in (self.row, self.column)], dim=-1)


def _neighbours(place: Tensor, size: Tensor, side: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two of 0 ... side - 1 that places on an axis of `size` lie between, and how much each of them counts."""
    at = place.float() * (side - 1) / (size - 1).clamp(min=1)
    low = at.floor()
    share = at - low
    index = low.long()
    return (index.clamp(max=side - 1), 1 - share), ((index + 1).clamp(max=side - 1), share)
