"""What a state of LESS recovers of the loss under eviction, beside four more tokens.

    recovered = (nll(policy) - nll(policy + state)) / (nll(policy) - nll(full))

Windows are paired; the standard error is that of the numerator over the mean gap. Four tokens take
about the bytes of eight features (the paper's Baseline+): half of them join H2O's newest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvsmith.eviction.policy import H2O, KeepAll
from kvsmith.pipeline.evaluation.candidate import Candidate
from kvsmith.pipeline.evaluation.fidelity import paired
from kvsmith.pipeline.report.table import Row
from kvsmith.spec import CacheSpec

MORE = 4  # tokens


def controls(candidates: Sequence[Candidate]) -> list[Candidate]:
    """For each candidate with a state: its eviction alone, and with four more tokens; each once."""
    found: dict[str, Candidate] = {}
    for one in candidates:
        spec = one.spec
        if spec is None or spec.less is None:
            continue
        own = {n: t for n, t in (one.parameters or {}).items() if ".less." not in n}
        for plain in (replace(spec, less=None), replace(widened(spec), less=None)):
            made = Candidate(_name(one, plain), "baseline", one.source, plain, own or None)
            found.setdefault(made.name, made)
    return list(found.values())


def widened(spec: CacheSpec) -> CacheSpec:
    """The same cache with four more tokens."""
    policy = spec.eviction
    assert not isinstance(policy, KeepAll)
    budget = policy.budget + MORE
    if isinstance(policy, H2O):
        newest = policy.protected + MORE // 2
        return replace(spec, eviction=replace(policy, budget=budget, recent=newest))
    return replace(spec, eviction=replace(policy, budget=budget))


def recoveries(rows: Sequence[Row]) -> list[str]:
    """A sentence for each row with a state, where its eviction alone is among the rows."""
    by_name = {row.name: row for row in rows}
    full = next((row for row in rows if row.candidate.role == "full"), None)
    said = []
    for row in rows:
        spec = row.candidate.spec
        if spec is None or spec.less is None or full is None:
            continue
        alone = by_name.get(_name(row.candidate, replace(spec, less=None)))
        wider = by_name.get(_name(row.candidate, replace(widened(spec), less=None)))
        if alone is None:
            continue
        text = f"{row.name}: of the loss under eviction {_share(row, alone, full)} recovered"
        if wider is not None:
            text += f"; {MORE} more tokens: {_share(wider, alone, full)}"
        speed = row.found.footprint.tokens_per_second / alone.found.footprint.tokens_per_second
        said.append(f"{text}; time of a token x {1 / speed:.2f}.")
    return said


def _share(row: Row, alone: Row, full: Row) -> str:
    """`31 % +- 4`."""
    losses = [r.found.fidelity.window_nll for r in (row, alone, full)]
    gap, gain = paired(losses[1], losses[2]), paired(losses[1], losses[0])
    if gap.mean <= 0:
        return "(there is none) nothing"
    doubt = "" if gain.se is None else f" +- {100 * gain.se / gap.mean:.0f}"
    return f"{100 * gain.mean / gap.mean:.0f} %{doubt}"


def _name(one: Candidate, plain: CacheSpec) -> str:
    """A word for an eviction alone: that of the candidate without its state."""
    policy = plain.eviction
    assert not isinstance(policy, KeepAll)
    codec = one.name.split(f"-{policy.kind}")[0]
    return f"{codec}-{policy.kind}{policy.budget}"
