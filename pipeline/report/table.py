"""The table of an evaluation as cells, Markdown and plain data; bundles compared with baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from kvsmith.errors import explain
from kvsmith.pipeline.evaluation import summaries
from kvsmith.pipeline.evaluation.candidate import Candidate
from kvsmith.pipeline.evaluation.fidelity import paired
from kvsmith.pipeline.evaluation.measure import Measurement
from kvsmith.pipeline.evaluation.questions import compared
from kvsmith.spec import CacheSpec
from kvsmith.strict import from_dict, to_dict

COLUMNS = (
    "method",
    "bits/elem",
    "at 32K",
    "KV bytes",
    "ppl",
    "ppl %",
    "+-",
    "KLD",
    "KLD 99.9%",
    "top-1 %",
    "tok/s",
)

# What a candidate writes and remembers; every +- is the standard error of what stands before it.
TASKS = (
    "method",
    "greedy %",
    "+-",
    "length",
    "+-",
    "drift",
    "+-",
    "recall",
    "+-",
    "exact %",
    "together",
    "+-",
    "exact %",
    "answers %",
    "+-",
)

LEGEND = (
    "bits/elem and KV bytes: every allocated byte of one row at the window's length; at 32K: the "
    "same computed for 32,768 tokens with dense tokens in bfloat16; ppl %: change of perplexity "
    "against full precision, +- its standard error paired by window; KLD: nats a token, mean and "
    "99.9 percentile; top-1: most likely token as in full precision; greedy: equal tokens, and "
    "mean length to the first difference; drift: KLD a generated token along full precision's own "
    "continuation; recall: nats a token that planting a string saves when it is to be copied, "
    "together: the same with a string at every depth of one text; exact: strings copied without "
    "error; answers: questions with the right final answer. +-: standard error of the mean."
)


@dataclass(frozen=True)
class Row:
    """One candidate and what was measured."""

    candidate: Candidate
    found: Measurement

    @property
    def bits(self) -> float:
        """All-in bits an element."""
        return self.found.footprint.bits_per_element

    @property
    def name(self) -> str:
        """The candidate's name."""
        return self.candidate.name


def ordered(candidates: Sequence[Candidate], found: Sequence[Measurement]) -> list[Row]:
    """Rows by all-in bits, the largest first; names break ties."""
    rows = [Row(c, m) for c, m in zip(candidates, found, strict=True)]
    return sorted(rows, key=lambda row: (-row.bits, row.name))


def cells(row: Row) -> list[str]:
    """One row under `COLUMNS`."""
    size, fidelity = row.found.footprint, row.found.fidelity
    full = row.candidate.role == "full"
    return [
        row.name,
        f"{size.bits_per_element:.2f}",
        f"{row.found.long_bits:.2f}",
        f"{size.nbytes:,}",
        f"{fidelity.perplexity:.3f}",
        "" if full else f"{100 * fidelity.delta:+.2f}",
        "" if full or fidelity.delta_se is None else f"{100 * fidelity.delta_se:.2f}",
        "" if full else f"{fidelity.kld:.2e}",
        "" if full else f"{fidelity.kld_999:.2e}",
        "" if full else f"{100 * fidelity.top1:.2f}",
        f"{size.tokens_per_second:.0f}",
    ]


def task_cells(row: Row) -> list[str]:
    """One row under `TASKS`."""
    found = row.found
    own, along, answers = found.agreement, found.drift, found.answers
    apart, together = found.recall, found.together
    return [
        row.name,
        *_with_spread(own.match, own.match_se, ".0f", 100),
        *_with_spread(own.length, own.length_se, ".0f"),
        *_with_spread(along.kld, along.kld_se, ".2e"),
        *_with_spread(apart.gain, apart.gain_se, ".2f"),
        f"{100 * apart.exact:.0f}",
        *_with_spread(together.gain, together.gain_se, ".2f"),
        f"{100 * together.exact:.0f}",
        *(
            ("", "")
            if answers is None
            else _with_spread(answers.exact, answers.exact_se, ".1f", 100)
        ),
    ]


def _with_spread(mean: float, se: float | None, digits: str, scale: float = 1) -> tuple[str, str]:
    return f"{scale * mean:{digits}}", "" if se is None else f"{scale * se:{digits}}"


def tables(rows: Sequence[Row]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """All tables of a comparison: a heading, columns, cells."""
    n = rows[0].found
    counts = (
        f"{n.agreement.prompts} prompts, {n.recall.keys} strings alone and {n.together.keys} "
        f"together{'' if n.answers is None else f', {n.answers.questions} questions'}"
    )
    return [
        ("Size and fidelity", COLUMNS, [cells(row) for row in rows]),
        (f"Generation and recall ({counts})", TASKS, [task_cells(row) for row in rows]),
    ]


def flat(row: Row) -> dict[str, object]:
    """One row as numbers with their full digits, for CSV; shares are in [0, 1]."""
    size, fidelity, found = row.found.footprint, row.found.fidelity, row.found
    return {
        "method": row.name,
        "role": row.candidate.role,
        "source": row.candidate.source,
        "bits_per_element": size.bits_per_element,
        "bits_at_32k": found.long_bits,
        "kv_bytes": size.nbytes,
        "length": size.length,
        "perplexity": fidelity.perplexity,
        "perplexity_change": fidelity.delta,
        "perplexity_change_se": fidelity.delta_se,
        "kld": fidelity.kld,
        "kld_se": fidelity.kld_se,
        "kld_999": fidelity.kld_999,
        "top1": fidelity.top1,
        "greedy_match": found.agreement.match,
        "greedy_match_se": found.agreement.match_se,
        "greedy_length": found.agreement.length,
        "greedy_length_se": found.agreement.length_se,
        "drift_kld": found.drift.kld,
        "drift_kld_se": found.drift.kld_se,
        "recall_gain": found.recall.gain,
        "recall_gain_se": found.recall.gain_se,
        "recall_exact": found.recall.exact,
        "together_gain": found.together.gain,
        "together_gain_se": found.together.gain_se,
        "together_exact": found.together.exact,
        "answers_exact": None if found.answers is None else found.answers.exact,
        "answers_exact_se": None if found.answers is None else found.answers.exact_se,
        "rouge1": None if found.rouge is None else found.rouge.rouge1,
        "rouge2": None if found.rouge is None else found.rouge.rouge2,
        "rouge_l": None if found.rouge is None else found.rouge.rouge_l,
        "rouge_l_se": None if found.rouge is None else found.rouge.rouge_l_se,
        "tokens_per_second": size.tokens_per_second,
    }


def answered(rows: Sequence[Row]) -> list[str]:
    """For each candidate that answered questions: the difference from full precision, paired."""
    full = next((row.found.answers for row in rows if row.candidate.role == "full"), None)
    if full is None:
        return []
    asked = f"on {full.questions} questions"
    return [
        f"{row.name}: {compared(row.found.answers.right, full.right)} {asked}."
        for row in rows
        if row.found.answers is not None and row.candidate.role != "full"
    ]


def summarised(rows: Sequence[Row]) -> list[str]:
    """For each candidate that summarised documents: ROUGE, and the difference from full precision,
    paired."""
    full = next((row.found.rouge for row in rows if row.candidate.role == "full"), None)
    if full is None:
        return []
    return [
        f"{row.name}: {summaries.compared(row.found.rouge, full)} on {full.documents} documents."
        for row in rows
        if row.found.rouge is not None
    ]


def comparisons(rows: Sequence[Row]) -> list[str]:
    """For each bundle, by perplexity on the same windows: what it beats, and what beats it."""
    baselines = [row for row in rows if row.candidate.role == "baseline"]
    return [_compare(row, baselines) for row in rows if row.candidate.role == "bundle"]


def _compare(bundle: Row, baselines: Sequence[Row]) -> str:
    """One line; a baseline that costs less and is worse says nothing either way and is left out."""
    dearer = [b for b in baselines if b.bits >= bundle.bits]
    beaten = [b for b in dearer if _gap(bundle, b)[0] < 0]
    ahead = [b for b in dearer if b not in beaten]
    cheaper = [b for b in baselines if b.bits < bundle.bits and _gap(bundle, b)[0] >= 0]
    parts = [f"better than {len(beaten)} of {len(dearer)} baselines with as many bits or more"]
    if beaten:
        parts[0] += f" ({_named(bundle, beaten)})"
    if ahead:
        parts.append(f"not better than {_named(bundle, ahead)}")
    if cheaper:
        parts.append(f"better with fewer bits: {_named(bundle, cheaper)}")
    else:
        parts.append("none with fewer bits is better")
    delta = 100 * bundle.found.fidelity.delta
    text = "; ".join(parts) if baselines else "no baselines"
    return f"{bundle.name} at {bundle.bits:.2f} bits, {delta:+.2f} % perplexity: {text}."


def _named(bundle: Row, others: Sequence[Row]) -> str:
    return ", ".join(
        f"{o.name} {o.bits:.2f}b {100 * o.found.fidelity.delta:+.2f} %{_doubt(bundle, o)}"
        for o in others
    )


def _gap(first: Row, second: Row) -> tuple[float, float | None]:
    """Paired difference of mean loss, nats a token: negative where `first` is better."""
    d = paired(first.found.fidelity.window_nll, second.found.fidelity.window_nll)
    return d.mean, d.se


def _doubt(bundle: Row, other: Row) -> str:
    """What speaks against a comparison: noise, or a divergence that ranks the two otherwise."""
    mean, se = _gap(bundle, other)
    closer = bundle.found.fidelity.kld < other.found.fidelity.kld
    noise = " [within 2 se]" if se is None or abs(mean) < 2 * se else ""
    return noise + (" [KLD the other way]" if closer != (mean < 0) else "")


def markdown(title: str, protocol: Sequence[str], rows: Sequence[Row]) -> str:
    """A Markdown page: title, how it was measured, table, comparisons."""
    bullets = [f"- {line}" for line in (*protocol, LEGEND)]
    notes = [f"- {line}" for line in (*comparisons(rows), *answered(rows))]
    parts = [line for table in tables(rows) for line in _table(*table)]
    return "\n".join([f"# {title}", "", *bullets, "", *parts, *notes]) + "\n"


def _table(heading: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    align = "|".join(["---", *("---:" for _ in columns[1:])])
    body = [f"| {' | '.join(cells)} |" for cells in lines]
    return [f"## {heading}", "", f"| {' | '.join(columns)} |", f"|{align}|", *body, ""]


def read(data: dict[str, Any], where: str) -> Row:
    """What `plain` wrote.

    Args:
        data: one row.
        where: configuration path that an error names.

    Raises:
        ValueError, TypeError: it is something else.
    """
    if missing := [name for name in ("name", "role", "source", "cache") if name not in data]:
        raise ValueError(explain(where, "key", f"{missing[0]!r} present", "nothing"))
    measured = {field.name: data.get(field.name) for field in fields(Measurement)}
    spec = None if data["cache"] is None else from_dict(CacheSpec, data["cache"], where)
    candidate = Candidate(data["name"], data["role"], data["source"], spec)
    return Row(candidate, from_dict(Measurement, measured, where))


def renamed(row: Row, name: str) -> Row:
    """The same under another name."""
    return Row(replace(row.candidate, name=name), row.found)


def plain(row: Row) -> dict[str, object]:
    """One row as plain data, with every figure and the cache's specification."""
    c = row.candidate
    return {
        "name": c.name,
        "role": c.role,
        "source": c.source,
        "cache": to_dict(c.spec),
        **to_dict(row.found),
    }
