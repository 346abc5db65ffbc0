"""Eviction policies: given what each token was worth so far, which ones stay.

A policy is plain data with two questions. `update` turns the attention that tokens just received
into their scores, `priority` turns scores into an order; the lowest go. Scores come in and go out,
a policy keeps nothing. Every policy holds at most `budget` tokens of a layer, all dense windows
included: sinks, then slots that tokens compete for, then the newest.

    policy   stays                                  source
    lambda   first `sinks`, then the newest         StreamingLLM, arXiv:2309.17453
    h2o      most attention since they were written H2O, arXiv:2306.14048
    tova     most attention from the newest query   TOVA, arXiv:2401.06104

Differs: H2O sums over the query heads of a KV head, so that each KV head keeps its own tokens; a
sum favours tokens that have been there for long, so `aging` divides it by a power of the age.
TOVA's mean over heads is that of the whole layer. Tokens leave in blocks, as they are encoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from kvsmith.errors import explain
from kvsmith.strict import added_later


@dataclass(frozen=True)
class KeepAll:
    """No eviction: every token stays."""

    kind: Literal["keep_all"] = field(default="keep_all", kw_only=True)


@dataclass(frozen=True)
class Lambda:
    """Sinks and a sliding window.

    Attributes:
        budget: tokens a layer holds at most, the new one included.
        sinks: first tokens of a sequence that always stay.
    """

    kind: Literal["lambda"] = field(default="lambda", kw_only=True)
    budget: int
    sinks: int = 4
    scored: ClassVar[bool] = False
    last_query: ClassVar[bool] = False
    by_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self.budget, self.sinks, 0)

    @property
    def protected(self) -> int:
        """Newest tokens that stay whatever their score."""
        return 0

    def update(self, scores: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """Nothing is scored."""
        return scores

    def priority(
        self, scores: torch.Tensor, place: torch.Tensor, age: torch.Tensor
    ) -> torch.Tensor:
        """The newer the better; see `H2O.priority`."""
        return _protect(-age.float(), place < self.sinks)


@dataclass(frozen=True)
class H2O:
    """Heavy hitters: the tokens that received most attention since they were written.

    Attributes:
        budget: tokens a layer holds at most, the new one included.
        recent: newest tokens that stay whatever their score; None is half of the budget.
        sinks: first tokens of a sequence that always stay.
        aging: scores count over age ** aging; 0 as published, 1 for attention a step.
    """

    kind: Literal["h2o"] = field(default="h2o", kw_only=True)
    budget: int
    recent: int | None = None
    sinks: int = 0
    aging: float = added_later(0.0)
    scored: ClassVar[bool] = True
    last_query: ClassVar[bool] = False
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.budget, self.sinks, self.protected)
        if not 0 <= self.aging <= 1:
            raise ValueError(explain("eviction.aging", "exponent", "in [0, 1]", self.aging))

    @property
    def protected(self) -> int:
        """Newest tokens that stay whatever their score."""
        return self.budget // 2 if self.recent is None else self.recent

    def update(self, scores: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """Add what tokens received in this step.

        Args:
            scores: [B, H, C] float32, 0 for new tokens.
            mass: [B, H, C] float32, attention received, summed over queries and query heads.

        Returns:
            [B, H, C] new scores.
        """
        return scores + mass

    def priority(
        self, scores: torch.Tensor, place: torch.Tensor, age: torch.Tensor
    ) -> torch.Tensor:
        """Order of staying.

        Args:
            scores: [B, H, C] float32.
            place: [B, H, C] int64, tokens of the row before this one.
            age: [B, H, C] int64, tokens after it.

        Returns:
            [B, H, C] float32; tokens with the highest stay, +inf for those that must.
        """
        if self.aging:
            scores = scores / (age + 1).float() ** self.aging
        return _protect(scores, (place < self.sinks) | (age < self.protected))


@dataclass(frozen=True)
class TOVA:
    """The tokens that the newest query attends to most, the same for all heads of a layer.

    Attributes:
        budget: tokens a layer holds at most, the new one included.
    """

    kind: Literal["tova"] = field(default="tova", kw_only=True)
    budget: int
    scored: ClassVar[bool] = True
    last_query: ClassVar[bool] = True
    by_head: ClassVar[bool] = False
    sinks: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check(self.budget, 0, 0)

    @property
    def protected(self) -> int:
        """Newest tokens that stay whatever their score."""
        return 0

    def update(self, scores: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """What tokens received from the newest query, summed over the heads; see `H2O.update`."""
        return mass.sum(1, keepdim=True).expand_as(mass).contiguous()

    def priority(
        self, scores: torch.Tensor, place: torch.Tensor, age: torch.Tensor
    ) -> torch.Tensor:
        """Scores as they are; see `H2O.priority`."""
        return scores


Policy = Lambda | H2O | TOVA
Eviction = KeepAll | Policy


def _protect(score: torch.Tensor, always: torch.Tensor) -> torch.Tensor:
    return score.masked_fill(always, float("inf"))


def _check(budget: int, sinks: int, recent: int) -> None:
    for name, value in (("budget", budget), ("sinks", sinks), ("recent", recent)):
        if value < 0:
            raise ValueError(explain(f"eviction.{name}", "token count", "at least 0", value))
    if budget < sinks + recent + 1:
        expected = f"at least sinks + recent + 1 = {sinks + recent + 1}"
        raise ValueError(explain("eviction.budget", "token count", expected, budget))
