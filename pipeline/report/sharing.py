"""`python -m kvsmith.pipeline.report.sharing FOLDER...`: a sweep of pretrainings, by KV bytes.

Runs differ in heads, map, learning rate and seed. Each kind is shown at its best learning rate: of
those with the most seeds the one with the lowest mean perplexity. Kinds of equal bytes stand
together.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvsmith.errors import explain
from kvsmith.pipeline.config import input_path, main_guard
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.stage import read_json

COLUMNS = ("tokens", "KV bytes a token", "model", "lr", "perplexity", "+-", "n", "rates tried")


@dataclass(frozen=True)
class Trained:
    """One model of the sweep.

    Attributes:
        tokens: that it was trained on.
        kv_bytes: of one token in bfloat16.
        heads, kv_heads, layers, owners: what makes `kv_bytes`.
        lr: peak learning rate.
        perplexity: held out.
    """

    tokens: int
    kv_bytes: int
    heads: int
    kv_heads: int
    layers: int
    owners: int
    lr: float
    perplexity: float

    @property
    def kind(self) -> str:
        """Word for tables: MHA, GQA or MQA, and how many layers own."""
        word = {self.heads: "MHA", 1: "MQA"}.get(self.kv_heads, f"GQA-{self.kv_heads}")
        return word if self.owners == self.layers else f"{word}, {self.owners} of {self.layers} own"


def find(folders: Sequence[Path]) -> list[Trained]:
    """Every pretrained model under some folders.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(path for folder in folders for path in folder.rglob("training.json"))
    records = [record for path in paths if "pretrain" in (record := read_json(path))]
    if not records:
        where, remedy = ", ".join(map(str, folders)), "Give the folder of a sweep of train.py."
        raise FileNotFoundError(explain(where, "training.json", "present", "nothing", remedy))
    return [_trained(record) for record in records]


def _trained(record: dict[str, object]) -> Trained:
    found: dict[str, dict[str, dict[str, int]]] = record  # type: ignore[assignment]
    arch, optim = found["pretrain"]["arch"], found["pretrain"]["optim"]
    owner = record.get("owner") or list(range(arch["layers"]))
    assert isinstance(owner, list)
    owners = len(set(owner))
    width = arch["kv_heads"] * arch["head_dim"]
    loss = float(found["heldout"]["loss"])  # type: ignore[arg-type]
    return Trained(
        int(record["tokens_seen"]),  # type: ignore[call-overload]
        2 * 2 * width * owners,
        arch["heads"],
        arch["kv_heads"],
        arch["layers"],
        owners,
        float(optim["lr"]),
        math.exp(loss),
    )


def rows(models: Sequence[Trained]) -> list[tuple[object, ...]]:
    """Cells under `COLUMNS`, most bytes first, then by perplexity."""
    kinds: dict[tuple[int, int, str], dict[float, list[float]]] = {}
    for m in models:
        by_rate = kinds.setdefault((m.tokens, m.kv_bytes, m.kind), {})
        by_rate.setdefault(m.lr, []).append(m.perplexity)
    found = []
    for (tokens, size, kind), by_rate in kinds.items():
        # One lucky seed is no better rate than three that were tried.
        lr, best = min(by_rate.items(), key=lambda item: (-len(item[1]), statistics.mean(item[1])))
        mean, spread = statistics.mean(best), statistics.stdev(best) if len(best) > 1 else None
        found.append((tokens, size, kind, lr, mean, spread, len(best), len(by_rate)))
    found.sort(key=lambda row: (row[0], -row[1], row[4]))
    return [
        (*row[:4], f"{row[4]:.2f}", "-" if row[5] is None else f"{row[5]:.2f}", *row[6:])
        for row in found
    ]


def main(arguments: Sequence[str]) -> int:
    """Show the table; `arguments` are folders."""

    def show() -> None:
        if not arguments:
            raise ValueError(explain("report.sharing", "folder", "given", "nothing"))
        table = rows(find([input_path(a) for a in arguments]))
        Run(None).table("sharing, at equal tokens", COLUMNS, table)

    return main_guard(show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
