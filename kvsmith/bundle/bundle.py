"""The bundle: the spec of a cache and its calibrated parameters, bound to a base model.

A bundle does not change: measured quality is given when it is made, and another bundle is another
object with another checksum.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvsmith.bundle import hub
from kvsmith.bundle.base_model import BaseModel, base_model
from kvsmith.bundle.card import model_card
from kvsmith.bundle.delta import DELTA_SHARD, Delta, check_weights
from kvsmith.bundle.errors import refuse
from kvsmith.bundle.folder import file_size, open_file, write_folder
from kvsmith.bundle.manifest import (
    CARD,
    FORMAT,
    MANIFEST,
    SHARD,
    SIZE_LIMIT,
    VERSION,
    Calibration,
    FileInfo,
    Manifest,
    read_manifest,
    write_manifest,
)
from kvsmith.bundle.shards import decode, encode
from kvsmith.bundle.strict_json import DAMAGED
from kvsmith.bundle.tensors import check_parameters, expected_tensors
from kvsmith.layout import DTYPES
from kvsmith.spec import CacheSpec
from kvsmith.version import __version__

if TYPE_CHECKING:
    from kvsmith.hf import KVCache

CARD_LIMIT = 2**20  # bytes of README.md


@dataclass(frozen=True, eq=False)
class Bundle:
    """A cache that can be given to its base model.

    Attributes:
        manifest: what manifest.json says.
        parameters: `layers.{i}.{k|v}.{lut|edges|scale|zero}` -> float32 tensor, see docs/FORMAT.md.
        card: text of README.md; empty where the bundle has none.
        source: where it was loaded from, for messages.
        weights: name -> weight that the model has instead of its base's; only with a delta.
    """

    manifest: Manifest
    parameters: dict[str, torch.Tensor]
    card: str
    source: str = "bundle"
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def spec(self) -> CacheSpec:
        """The cache that the bundle describes."""
        return self.manifest.cache

    @staticmethod
    def create(
        spec: CacheSpec,
        parameters: Mapping[str, torch.Tensor],
        base: BaseModel,
        calibration: Calibration | None = None,
        quality: Mapping[str, float] | None = None,
        created_by: str | None = None,
        delta: Delta | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> Bundle:
        """Make a bundle.

        Args:
            spec: the cache.
            parameters: exactly the tensors that the codec owns in the base model.
            base: the model, see `base_model`.
            calibration: where the parameters come from; None for a codec without parameters.
            quality: measured numbers by name.
            created_by: program and version; None is this one.
            delta: how the model comes from another one; its `files` are set here.
            weights: those that differ, of the delta's dtype.

        Returns:
            A checked bundle.

        Raises:
            BundleError: as for a bundle that is loaded.
        """
        program = created_by or f"kvsmith {__version__}"
        numbers = {name: float(value) for name, value in (quality or {}).items()}
        delta = None if delta is None else replace(delta, files=())
        manifest = Manifest(FORMAT, VERSION, program, base, spec, calibration, {}, numbers, delta)
        read_manifest(write_manifest(manifest), MANIFEST)  # what we write can be read
        check_parameters(spec, base.geometry, parameters, "parameters")
        check_weights(delta, weights or {}, "weights")
        names = expected_tensors(spec, base.geometry)
        own = {name: parameters[name].detach().cpu().contiguous() for name in names}
        changed = {n: w.detach().cpu().contiguous() for n, w in sorted((weights or {}).items())}
        bundle = Bundle(manifest, own, model_card(manifest), weights=changed)
        return replace(bundle, manifest=bundle._listing(bundle._contents()))

    def cache(self, model: Any) -> KVCache:
        """A fresh, empty cache for `generate(..., past_key_values=cache)`.

        Args:
            model: a transformers model of the kind that the bundle was made for.

        Returns:
            The cache; one for each sequence (or batch of sequences).

        Raises:
            BundleError: the model is not the bundle's base model.
        """
        from kvsmith.hf import geometry, make_cache

        config = model.config.get_text_config(decoder=True)
        found = base_model(config.to_dict(), geometry(model.config), self.manifest.base_model.id)
        base, delta = self.manifest.base_model, self.manifest.delta
        before = base.unshared.config_hash
        if delta is not None and found.config_hash == before != base.config_hash:
            remedy = "Call bundle.apply(model) first (scripts: model.delta=FOLDER)."
            raise refuse(self.source, "model", "one whose layers share", "its base", remedy)
        base.check(found, self.source)
        return make_cache(model, self.spec, self.parameters)

    def apply(self, model: Any) -> None:
        """Turn the model that a delta was made for into the bundle's own, whose layers share.

        Args:
            model: a transformers model in memory, not quantized; changed in place, or not at all.

        Raises:
            BundleError: the bundle has no delta, or one for another model or other weights.
            ValueError: a weight is quantized or not in memory, or the model cannot share.
        """
        from kvsmith.hf import geometry, share
        from kvsmith.hf.weights import change_weights, weights_hash, weights_in_memory

        delta, base = self.manifest.delta, self.manifest.base_model
        if delta is None:
            remedy = "The bundle is for its model as it is; call cache(model)."
            raise refuse(self.source, "delta", "in the bundle", "none", remedy)
        config = model.config.get_text_config(decoder=True)
        found = base_model(config.to_dict(), geometry(model.config), base.id)
        before = replace(base.unshared, id=delta.id)
        if found.config_hash == base.config_hash != before.config_hash:
            expected, remedy = f"{delta.id} as it was", "Load it again to apply another delta."
            raise refuse(self.source, "model", expected, "one whose layers share", remedy)
        before.check(found, self.source)
        own = weights_in_memory(model, self.source)
        if (digest := weights_hash(own.items())) != delta.weights_hash:
            remedy = f"The delta was made for {delta.id}; load that model as it was."
            expected = f"{delta.weights_hash[:16]} ({delta.id})"
            raise refuse(self.source, "base model's weights", expected, digest[:16], remedy)
        for name, weight in self.weights.items():
            shape = list(own[name].shape) if name in own else "one of the model's weights"
            if shape != list(weight.shape):
                raise refuse(f"{self.source}: {name}", "weight", str(shape), list(weight.shape))
        if base.owner != before.owner:
            share(model, base.owner)
        change_weights(own, self.weights, DTYPES[delta.dtype])

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the bundle; the folder is whole or absent at every moment.

        Args:
            folder: new, empty, or holding the same bundle (then nothing happens).
            overwrite: replace another bundle that is there.

        Returns:
            The folder.

        Raises:
            BundleError: the folder holds something else.
        """
        files = self._contents()
        manifest = write_manifest(self._listing(files))
        write_folder(Path(folder), {MANIFEST: manifest, **files}, overwrite)
        return Path(folder)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Bundle:
        """Load a local folder or a bundle of the hub.

        Args:
            name: folder, or hub repository `owner/name`.
            revision: branch, tag or commit of the hub's; None is main.
            token: access token; None is the stored one.
            cache_dir: hub cache; None is the default one.

        Returns:
            The bundle, everything checked.

        Raises:
            BundleError: absent, damaged, newer than this program, or not a bundle.
        """
        if Path(name).is_dir() or isinstance(name, Path):
            return load(name)
        snapshot, links = hub.fetch(name, revision, token, cache_dir)
        return _load(snapshot, name, links)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload kvsmith bundle",
    ) -> str:
        """Upload the bundle with its model card.

        Args:
            repo_id: repository `owner/name`; made where it is missing.
            private: of a new repository; None is the account's default.
            token: access token; None is the stored one.
            commit_message: of the commit.

        Returns:
            Address of the commit.

        Raises:
            BundleError: the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = self.save_pretrained(Path(folder) / "bundle")
            return hub.push(path, repo_id, private, token, commit_message)

    def _contents(self) -> dict[str, bytes]:
        """Every file but the manifest."""
        files = {SHARD: encode(self.parameters)} if self.parameters else {}
        files |= {DELTA_SHARD: encode(self.weights)} if self.weights else {}
        return {CARD: self.card.encode(), **files} if self.card else files

    def _listing(self, files: Mapping[str, bytes]) -> Manifest:
        """The manifest that lists these files."""
        delta = self.manifest.delta
        if delta is not None:
            delta = replace(delta, files=(DELTA_SHARD,) if DELTA_SHARD in files else ())
        return replace(self.manifest, files=_infos(files), delta=delta)


def load(folder: str | Path) -> Bundle:
    """Load a bundle from a local folder.

    Args:
        folder: as `export.py` or `Bundle.save_pretrained` wrote it.

    Returns:
        The bundle, everything checked.

    Raises:
        BundleError: absent, damaged, newer than this program, or not a bundle.
    """
    return _load(Path(folder), str(folder), None)


def _load(folder: Path, source: str, links_into: Path | None) -> Bundle:
    if not folder.is_dir():
        remedy = "Give the folder that export.py printed."
        raise refuse(source, "bundle", "an existing folder", "nothing", remedy)
    where = str(folder / MANIFEST)
    with open_file(folder, MANIFEST, links_into) as file:
        if (size := file_size(file)) > SIZE_LIMIT:
            raise refuse(where, "size", f"at most {SIZE_LIMIT} bytes", size)
        manifest = read_manifest(file.read(SIZE_LIMIT + 1), where)
    card, parameters = "", {}
    weights: dict[str, torch.Tensor] = {}
    expected = expected_tensors(manifest.cache, manifest.base_model.geometry)
    left, delta = dict(expected), manifest.delta
    for name, info in sorted(manifest.files.items()):
        path = str(folder / name)
        with open_file(folder, name, links_into) as file:
            if (size := file_size(file)) != info.size:
                raise refuse(path, "size", f"{info.size} bytes", size, DAMAGED)
            if name == CARD:
                card = _read_card(file.read(CARD_LIMIT + 1), info, path)
            elif delta is not None and name in delta.files:
                found = decode(file, info, None, path, DTYPES[delta.dtype])
                if twice := sorted(found.keys() & weights.keys()):
                    raise refuse(path, "weight", "in one shard", repr(twice[0]))
                weights.update(found)
            else:
                found = decode(file, info, left, path)
                parameters.update(found)
                for tensor in found:
                    del left[tensor]
    check_parameters(manifest.cache, manifest.base_model.geometry, parameters, str(folder))
    check_weights(delta, weights, str(folder))
    ordered = {n: parameters[n] for n in expected}
    return Bundle(manifest, ordered, card, source, dict(sorted(weights.items())))


def _read_card(raw: bytes, info: FileInfo, where: str) -> str:
    if len(raw) > CARD_LIMIT:
        raise refuse(where, "size", f"at most {CARD_LIMIT} bytes", info.size)
    if (digest := hashlib.sha256(raw).hexdigest()) != info.sha256:
        raise refuse(where, "sha256", info.sha256, digest, DAMAGED)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise refuse(where, "file", "UTF-8 text", "other bytes", DAMAGED) from None


def _infos(files: Mapping[str, bytes]) -> dict[str, FileInfo]:
    return {n: FileInfo(hashlib.sha256(d).hexdigest(), len(d)) for n, d in files.items()}
