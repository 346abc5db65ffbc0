"""Where the pages of a layer lie, on the device, for kernels that read all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvsmith.pages import Page


class PageTable:
    """Addresses of pages, written one by one as pages come and made anew when their order changes
    or room runs out.
    """

    def __init__(self) -> None:
        self._addresses: torch.Tensor | None = None

    def forget(self) -> None:
        """Pages were moved or dropped."""
        self._addresses = None

    def add(self, pages: Sequence[Page]) -> None:
        """The last of the pages is new."""
        if self._addresses is not None and len(pages) <= len(self._addresses):
            self._addresses[len(pages) - 1] = pages[-1].buffer.data_ptr()
        else:
            self.forget()

    def of(self, pages: Sequence[Page]) -> torch.Tensor:
        """[at least as many as pages] int64 addresses of the buffers, on their device."""
        if self._addresses is None:
            found = [p.buffer.data_ptr() for p in pages]
            room = torch.zeros(max(64, 2 * len(found)), dtype=torch.int64)
            room[: len(found)] = torch.tensor(found, dtype=torch.int64)
            self._addresses = room.to(pages[0].buffer.device)
        return self._addresses
