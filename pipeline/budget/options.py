"""What may be chosen, within what, and on how much text it is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.units import parse_bytes, parse_count

LENGTH = 512  # tokens of a window, where the model's context allows it
SHORTEST = 8


@dataclass(frozen=True)
class BudgetOptions:
    """The budget solver; group `fit` of calibrate.py.

    Args:
        bytes: of the whole cache of one row at `context`, "20GiB"; None where `target_bits` is
            given.
        context: tokens at which bytes and all-in bits are counted, dense tokens in bfloat16.
        widths: code widths to choose from.
        fractions: shares of outliers to choose from.
        ranks: of the low-rank term of what a codec leaves; 0 is none. Its factors are those of the
            template's term, else of 4 bits.
        recents: newest tokens that stay dense to choose from, for each layer apart; empty for the
            template's.
        template: preset of `conf/codec` whose kind of quantizer, outliers and windows are used.
        trained: folder that train.py left: tokens beyond the budget go into its state, and how many
            stay is weighed against their bits. Windows are then `context` tokens long.
        windows: calibration windows on which sensitivity is measured.
        length: tokens of a window; None is 512, or the model's context where that is less.
        prefill: tokens of the first forward pass; None is an eighth of the window.
        chunk: tokens decoded at once; None is 32, or 8 where windows are chosen: tokens of a chunk
            see one another as they are, so a chunk hides a shorter window.
        batch: windows side by side.
        check: held-out windows on which the choice is compared with uniform ones; 0 leaves it out.
        points: budgets of a curve.
    """

    bytes: int | str | None = None
    context: int | str = "32Ki"
    widths: tuple[int, ...] = (2, 3, 4)
    fractions: tuple[float, ...] = (0.0, 0.01, 0.02)
    ranks: tuple[int, ...] = (0,)
    recents: tuple[int, ...] = ()
    template: str = "nuq4_o1"
    trained: str | None = None
    windows: int = 8
    length: int | None = None
    prefill: int | None = None
    chunk: int | None = None
    batch: int = 8
    check: int = 8
    points: int = 9

    def __post_init__(self) -> None:
        for name, least in (
            ("windows", 1),
            ("batch", 1),
            ("check", 0),
            ("points", 2),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    explain(f"fit.{name}", "value", f"at least {least}", getattr(self, name))
                )
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(explain("fit.chunk", "value", "at least 1", self.chunk))
        for name in ("widths", "fractions", "ranks", "recents"):
            found = getattr(self, name)
            if not (found or name == "recents") or len(set(found)) < len(found):
                raise ValueError(
                    explain(f"fit.{name}", "value", "a list without repeats", list(found))
                )
        for name, least in (("ranks", 0), ("recents", 0), ("fractions", 0)):
            if found := [x for x in getattr(self, name) if not x >= least]:
                raise ValueError(explain(f"fit.{name}", "value", f"at least {least}", found[0]))

    @property
    def tokens(self) -> int:
        """`context` as a number."""
        return parse_count(self.context, "fit.context")

    def budget(self, target_bits: float | None, shape: ModelGeometry) -> int | None:
        """Bytes that a cache may take; None where nothing is asked.

        Args:
            target_bits: all-in bits an element, or None.
            shape: the model.

        Raises:
            ValueError: both are given, or the bits are not positive.
        """
        if target_bits is None:
            return None if self.bytes is None else parse_bytes(self.bytes, "fit.bytes")
        if self.bytes is not None:
            remedy = "Give one of the two."
            raise ValueError(explain("fit.bytes", "value", "null", self.bytes, remedy))
        if not 0 < target_bits < math.inf:
            raise ValueError(explain("target_bits", "value", "positive", target_bits))
        return int(target_bits * shape.elements * self.tokens / 8)

    @property
    def step(self) -> int:
        """`chunk` as a number."""
        return self.chunk or (8 if len(self.recents) > 1 else 32)

    def window(self, context: int) -> int:
        """Tokens of a window, for a model of so many positions.

        Raises:
            ValueError: they are too few to score one, or beyond the model's positions.
        """
        length = min(LENGTH, context) if self.length is None else self.length
        if self.trained is not None:
            # An eviction is worth nothing to know at another length than it is for.
            length = self.tokens
            if length > context:
                expected = f"at most the model's context of {context} where tokens are evicted"
                raise ValueError(explain("fit.context", "tokens", expected, length))
        if not SHORTEST <= length <= context:
            expected = f"at least {SHORTEST}, and at most the model's context of {context}"
            raise ValueError(explain("fit.length", "tokens of a window", expected, length))
        if self.prefill is not None and not 1 <= self.prefill <= length - 2:
            expected = f"between 1 and fit.length - 2 = {length - 2}"
            raise ValueError(explain("fit.prefill", "tokens", expected, self.prefill))
        return length
