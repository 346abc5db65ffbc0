"""Count the bytes that a kernel's loads and stores name while the interpreter runs it.

A masked-out element counts nothing; an element that is loaded twice counts twice. Caches are thus
left out: the count is what the kernel asks for, an upper bound of what memory must deliver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder


@dataclass
class Counted:
    """Bytes so far."""

    loads: int = 0
    stores: int = 0

    @property
    def total(self) -> int:
        """Loads and stores together."""
        return self.loads + self.stores


@contextmanager
def counted_bytes() -> Iterator[Counted]:
    """Count what kernels load and store inside the `with`."""
    count = Counted()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        count.loads += _nbytes(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counting_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count.stores += _nbytes(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        yield count


def _nbytes(ptrs: Any, mask: Any) -> int:
    """Bytes of the elements whose mask is true."""
    width = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
    return int(np.broadcast_to(mask.data, ptrs.data.shape).sum()) * width
