"""Which tokens a training step reads: a pure function of the seed and the step, with no state.

Each pass over the text shifts the window grid by a random offset and visits the windows in a random
order; the text of a window is contiguous, so that neighbouring documents of the same source stay in
each other's context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvsmith.errors import explain


class Windows:
    """Batches of contiguous windows over one token stream.

    Args:
        stream: [tokens] int64, the training split.
        length: tokens predicted in a window; a window holds one more.
        batch: windows in a step.
        seed: of the order.

    Raises:
        ValueError: the stream is shorter than two windows.
    """

    def __init__(self, stream: Tensor, length: int, batch: int, seed: int) -> None:
        if len(stream) < 2 * length + 1:
            remedy = "Give more text or a shorter pretrain.phases length."
            raise ValueError(
                explain(
                    "data",
                    "training split",
                    f"at least {2 * length + 1} tokens",
                    len(stream),
                    remedy,
                )
            )
        self._stream, self._length, self._batch, self._seed = stream, length, batch, seed
        self._per_pass = (len(stream) - 1) // length - 1
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    def batch(self, step: int) -> Tensor:
        """The windows of a step.

        Args:
            step: from 0.

        Returns:
            [batch, length + 1] int64; inputs are `[:, :-1]`, targets `[:, 1:]`.
        """
        first = step * self._batch
        return torch.stack([self._window(index) for index in range(first, first + self._batch)])

    def _window(self, index: int) -> Tensor:
        number, place = divmod(index, self._per_pass)
        if self._order[0] != number:
            self._order = (number, self._starts(number))
        start = int(self._order[1][place])
        return self._stream[start : start + self._length + 1]

    def _starts(self, number: int) -> Tensor:
        """Window starts of pass `number`, shuffled; the grid is shifted by less than one window."""
        draw = torch.Generator().manual_seed(mix(self._seed, self._length, number))
        shift = int(torch.randint(0, self._length, (), generator=draw))
        return torch.randperm(self._per_pass, generator=draw) * self._length + shift


def mix(*parts: int) -> int:
    """One 63-bit seed from several numbers (an FNV-style fold): nearby seeds are unrelated."""
    value = 0xCBF29CE484222325
    for part in parts:
        value = ((value ^ (part & 0xFFFFFFFF)) * 0x100000001B3) & 0x7FFFFFFFFFFFFFFF
    return value
