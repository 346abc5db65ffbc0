"""Statistics of all layers: a few in memory, the rest in files that double as the checkpoint.

A pass meets the layers one after the other, always in the same order. Those that exceed the budget
are written to `layer-000-<tokens taken>.safetensors` when the next one comes, and read
back when their turn comes again. A checkpoint writes what only memory has, and then a list of the
files that belong together. Each tensor of each layer counts the sequences it has taken in, so a
checkpoint may fall between two layers of one batch: a sequence is never counted twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.geometry import LayerGeometry
from kvsmith.pipeline.calibration.record import layer_file
from kvsmith.pipeline.stage import file_hash, read_json, read_safetensors, write_json
from kvsmith.pipeline.stage import write_safetensors as write
from kvsmith.pipeline.statistics import LayerStatistics, Plan
from kvsmith.pipeline.statistics.plan import TensorName

BUDGET = 256 * 2**20  # bytes of statistics that stay in host memory
FACTS = "checkpoint.json"


@dataclass
class Entry:
    """What is known of one layer.

    Attributes:
        taken: sequences that went in, by tensor.
        file: name of its newest file; None if there is none.
        sha256: of that file.
        stats: the statistics, while they are in memory.
        fresh: whether memory has what the file has not.
    """

    taken: dict[str, int]
    file: str | None = None
    sha256: str | None = None
    stats: LayerStatistics | None = None
    fresh: bool = False


class Store:
    """Statistics by layer.

    Args:
        folder: for the files.
        plan: what is observed.
        layers: geometry of each layer that owns its tokens.
        budget: bytes in host memory, beside the layer in hand.
    """

    def __init__(
        self, folder: Path, plan: Plan, layers: Mapping[int, LayerGeometry], budget: int = BUDGET
    ) -> None:
        self.folder, self.plan, self.layers, self.budget = folder, plan, layers, budget
        self._entries = {i: Entry({"k": 0, "v": 0}) for i in layers}
        self._listed: set[str] = set()
        self._last: int | None = None

    def update(
        self, layer: int, name: TensorName, number: int, values: Tensor, fisher: Tensor | None
    ) -> None:
        """Take in the sequence `number` of one tensor, unless it was taken in before."""
        entry = self._entries[layer]
        if number < entry.taken[name]:
            return
        assert number == entry.taken[name], "sequences come in order"
        self.load(layer, values.device).update(name, values, fisher)
        entry.taken[name] += 1
        entry.fresh = True

    def load(self, layer: int, device: torch.device | str = "cpu") -> LayerStatistics:
        """Statistics of a layer, to read."""
        entry = self._entries[layer]
        if layer != self._last:
            self._make_room(layer)
            self._last = layer
        if entry.stats is None:
            entry.stats = self.read(layer, device)
        return entry.stats

    def read(self, layer: int, device: torch.device | str = "cpu") -> LayerStatistics:
        """Statistics of a layer as its newest file has them; they are not kept here."""
        stats, entry = LayerStatistics(self.plan, self.layers[layer], device), self._entries[layer]
        if entry.file is not None:
            stats.load_state_dict(self._read(entry))
        return stats

    def save(self, facts: Mapping[str, Any]) -> None:
        """Write a checkpoint with the facts of the pass."""
        for layer in self._entries:
            self._write(layer)
        layers = {
            str(i): {"file": e.file, "sha256": e.sha256, "taken": e.taken}
            for i, e in self._entries.items()
        }
        write_json(self.folder / FACTS, {**facts, "layers": layers})
        self._listed = {e.file for e in self._entries.values() if e.file is not None}
        for old in self.folder.glob("layer-*.safetensors"):
            if old.name not in self._listed:
                old.unlink()

    def forget(self) -> None:
        """Free the memory of what was saved."""
        for entry in self._entries.values():
            assert not entry.fresh, "only what files have is forgotten"
            entry.stats = None

    def restore(self, source: str) -> dict[str, Any] | None:
        """Go on from a checkpoint of the same source; its facts, or None if there is none.

        Raises:
            ValueError: a file of it was changed.
        """
        if not (self.folder / FACTS).is_file():
            return None
        facts: dict[str, Any] = read_json(self.folder / FACTS)
        if facts.get("source") != source or not isinstance(facts.get("layers"), dict):
            return None
        for layer, entry in self._entries.items():
            found = facts["layers"][str(layer)]
            entry.file, entry.sha256 = found["file"], found["sha256"]
            entry.taken = {name: int(found["taken"][name]) for name in ("k", "v")}
            self._check(entry)
        self._listed = {e.file for e in self._entries.values() if e.file is not None}
        return facts

    def clear(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_room(self, coming: int) -> None:
        """Leave out layers until the budget holds: the latest first, as it is needed last."""
        held = [i for i, e in self._entries.items() if e.stats is not None and i != coming]
        held.sort(key=lambda i: i != self._last)
        sizes = {i: _host_bytes(self._entries[i].stats) for i in held}
        total = sum(sizes.values())
        for layer in held:
            if total <= self.budget:
                return
            if sizes[layer]:
                self._write(layer)
                self._entries[layer].stats = None
                total -= sizes[layer]

    def _write(self, layer: int) -> None:
        entry = self._entries[layer]
        if not entry.fresh:
            return
        assert entry.stats is not None
        old = entry.file
        entry.file = f"{layer_file(layer)}-{sum(entry.taken.values()):06d}.safetensors"
        write(self.folder / entry.file, entry.stats.state_dict())
        entry.sha256 = file_hash(self.folder / entry.file)
        entry.fresh = False
        if old is not None and old not in self._listed:
            (self.folder / old).unlink(missing_ok=True)

    def _read(self, entry: Entry) -> dict[str, Tensor]:
        return read_safetensors(self.folder / str(entry.file))

    def _check(self, entry: Entry) -> None:
        if entry.file is None:
            return
        path = self.folder / entry.file
        remedy = f"Delete {self.folder} to start again."
        if not path.is_file():
            raise ValueError(explain(str(path), "checkpoint", "present", "nothing", remedy))
        if file_hash(path) != entry.sha256:
            raise ValueError(explain(str(path), "checkpoint", "as written", "changed", remedy))


def _host_bytes(stats: LayerStatistics | None) -> int:
    """Bytes in host memory; 0 where a layer lives on another device."""
    return 0 if stats is None else sum(t.nbytes for t in stats.tensors() if t.device.type == "cpu")
