"""The bundle: the spec of a cache and its calibrated parameters, bound to a base model.

A bundle does not change: measured quality is given when it is made, and another bundle is another
object with another checksum.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvsmith.bundle import hub
from kvsmith.bundle.base_model import BaseModel, base_model
from kvsmith.bundle.card import model_card
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
from kvsmith.bundle.strict_json import DAMAGED
from kvsmith.bundle.tensors import check_parameters, decode, encode, expected_tensors
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
    """

    manifest: Manifest
    parameters: dict[str, torch.Tensor]
    card: str
    source: str = "bundle"

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
    ) -> Bundle:
        """Make a bundle.

        Args:
            spec: the cache.
            parameters: exactly the tensors that the codec owns in the base model.
            base: the model, see `base_model`.
            calibration: where the parameters come from; None for a codec without parameters.
            quality: measured numbers by name.
            created_by: program and version; None is this one.

        Returns:
            A checked bundle.

        Raises:
            BundleError: as for a bundle that is loaded.
        """
        program = created_by or f"kvsmith {__version__}"
        numbers = {name: float(value) for name, value in (quality or {}).items()}
        manifest = Manifest(FORMAT, VERSION, program, base, spec, calibration, {}, numbers)
        read_manifest(write_manifest(manifest), MANIFEST)  # what we write can be read
        check_parameters(spec, base.geometry, parameters, "parameters")
        names = expected_tensors(spec, base.geometry)
        own = {name: parameters[name].detach().cpu().contiguous() for name in names}
        bundle = Bundle(manifest, own, model_card(manifest))
        return replace(bundle, manifest=replace(manifest, files=_infos(bundle._contents())))

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
        self.manifest.base_model.check(found, self.source)
        return make_cache(model, self.spec, self.parameters)

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
        manifest = replace(self.manifest, files=_infos(files))
        write_folder(Path(folder), {MANIFEST: write_manifest(manifest), **files}, overwrite)
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
        return {CARD: self.card.encode(), **files} if self.card else files


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
    expected = expected_tensors(manifest.cache, manifest.base_model.geometry)
    left = dict(expected)
    for name, info in sorted(manifest.files.items()):
        path = str(folder / name)
        with open_file(folder, name, links_into) as file:
            if (size := file_size(file)) != info.size:
                raise refuse(path, "size", f"{info.size} bytes", size, DAMAGED)
            if name == CARD:
                card = _read_card(file.read(CARD_LIMIT + 1), info, path)
                continue
            found = decode(file, info, left, path)
            parameters.update(found)
            for tensor in found:
                del left[tensor]
    check_parameters(manifest.cache, manifest.base_model.geometry, parameters, str(folder))
    ordered = {n: parameters[n] for n in expected}
    return Bundle(manifest, ordered, card, source)


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
