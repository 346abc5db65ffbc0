"""What is trained, and for which eviction; `conf/less` and `conf/eviction`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvsmith.errors import explain
from kvsmith.eviction.policy import H2O, TOVA, Eviction, KeepAll, Lambda, Policy
from kvsmith.less.spec import Exponential, Features, Less
from kvsmith.strict import added_later

Budget = int | float


@dataclass(frozen=True)
class LambdaChoice:
    """`lambda` with a budget in tokens, or below 1 as a share of the model's context."""

    kind: Literal["lambda"] = field(default="lambda", kw_only=True)
    budget: Budget
    sinks: int = 4


@dataclass(frozen=True)
class H2OChoice:
    """`h2o`; the budget as in `LambdaChoice`."""

    kind: Literal["h2o"] = field(default="h2o", kw_only=True)
    budget: Budget
    recent: int | None = None
    sinks: int = 0
    aging: float = 0.0


@dataclass(frozen=True)
class TOVAChoice:
    """`tova`; the budget as in `LambdaChoice`."""

    kind: Literal["tova"] = field(default="tova", kw_only=True)
    budget: Budget


EvictionChoice = KeepAll | LambdaChoice | H2OChoice | TOVAChoice


def context_of(config: Any) -> int | None:
    """Longest sequence of a model in tokens, None where its configuration names none."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def resolve(choice: EvictionChoice, context: int | None) -> Eviction:
    """The policy, its budget in tokens.

    Args:
        choice: of `conf/eviction`.
        context: longest sequence of the model in tokens; None where it has no limit.

    Raises:
        ValueError: a share without a context, a budget over the context, or a budget that is too
            small for the policy.
    """
    if isinstance(choice, KeepAll):
        return choice
    tokens = choice.budget
    if tokens < 1:
        if context is None or tokens <= 0:
            expected = "tokens, or a share above 0 of a context that the model states"
            raise ValueError(explain("eviction.budget", "value", expected, tokens))
        tokens = round(tokens * context)
    if int(tokens) != tokens or (context is not None and tokens >= context):
        expected = "whole tokens" if context is None else f"whole tokens below context {context}"
        raise ValueError(explain("eviction.budget", "value", expected, tokens))
    budget = int(tokens)
    if isinstance(choice, LambdaChoice):
        return Lambda(budget, sinks=choice.sinks)
    if isinstance(choice, H2OChoice):
        return H2O(budget, choice.recent, choice.sinks, choice.aging)
    return TOVA(budget)


def scaled(policy: Policy, factor: float, least: int) -> Policy:
    """The policy with another budget, at least `least` tokens; windows shrink and grow with it."""
    budget = max(round(policy.budget * factor), least)
    if isinstance(policy, H2O) and policy.recent is not None:
        return replace(policy, budget=budget, recent=round(policy.recent * budget / policy.budget))
    return replace(policy, budget=budget)


@dataclass(frozen=True)
class LessTraining:
    """How states are trained.

    Args:
        features: feature maps.
        rank: features of a state as it is exported.
        trained_ranks: ranks that one training serves; a smaller rank is the first features of a
            larger one.
        allot: divide the bytes of `rank` among layers by what they gain.
        store_dtype: of the exported state's values.
        budgets: factors of the eviction's budget that training goes through in turn.
        samples, length, batch_size: sequences, tokens of each (None: the model's context, at most
            4096), sequences read at once.
        steps: optimizer steps on each batch.
        stride: of the blocks of queries that a step looks at.
        lr: largest learning rate; a cosine ends at a twentieth of it.
        held: sequences of the calibration split that measure what was gained.
        seed: of initial features, sequences and choices.
        joint_steps: further steps with all layers compressed at once, on the model's predictions.
        joint_lr: largest learning rate of those.
    """

    features: Features = field(default_factory=Exponential)
    rank: int = 8
    trained_ranks: tuple[int, ...] = (8,)
    allot: bool = False
    store_dtype: Literal["float16", "float32", "int8"] = "float16"
    budgets: tuple[float, ...] = (1.0,)
    samples: int = 64
    length: int | None = None
    batch_size: int = 8
    steps: int = 40
    stride: int = 8
    lr: float = 0.03
    held: int = 8
    seed: int = 0
    joint_steps: int = added_later(0)
    joint_lr: float = added_later(0.003)

    def __post_init__(self) -> None:
        if self.joint_steps < 0:
            raise ValueError(explain("less.joint_steps", "value", "at least 0", self.joint_steps))
        for name in ("samples", "batch_size", "steps", "stride", "held"):
            if getattr(self, name) < 1:
                raise ValueError(
                    explain(f"less.{name}", "value", "at least 1", getattr(self, name))
                )
        if self.rank not in self.trained_ranks:
            expected = f"one of trained_ranks {list(self.trained_ranks)}"
            raise ValueError(explain("less.rank", "value", expected, self.rank))
        if not self.budgets or min(self.budgets) <= 0:
            raise ValueError(explain("less.budgets", "factors", "positive", list(self.budgets)))

    @property
    def largest(self) -> int:
        """The rank of the trained tensors."""
        return max(self.trained_ranks)

    def spec(self, ranks: tuple[int, ...] = ()) -> Less:
        """The state that is exported."""
        return Less(self.features, self.rank, ranks, self.store_dtype)

    def smoke(self) -> LessTraining:
        """The same path in seconds."""
        return replace(
            self, samples=4, batch_size=2, steps=3, held=2, joint_steps=min(self.joint_steps, 2)
        )
