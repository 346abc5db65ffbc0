"""Which model a bundle belongs to: enough of its configuration to tell a wrong one.

The fingerprint covers the shape of every layer, the position encoding and the sizes that set model
families apart. It does not cover the weights: a fine-tuned model of the same shape keeps it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvsmith.bundle.errors import refuse
from kvsmith.errors import explain
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.strict import to_dict

ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "n_embd",
    "d_model",
    "intermediate_size",
    "vocab_size",
)
ROPE = (
    "rope_parameters",
    "rotary_dim",
    "partial_rotary_factor",
    "no_rope_layers",
    "alibi",
)
LAYERS_LIMIT, SIZE_LIMIT = 4096, 65536


@dataclass(frozen=True)
class BaseModel:
    """Identity and fingerprint of a model.

    Attributes:
        id: hub name, or the word that the exporter's configuration gave it.
        revision: commit of a hub model, None for a local one.
        config_hash: SHA-256 of the fields below as canonical JSON.
        architecture: sizes and family, as the model's configuration names them.
        rope: position encoding, as the model's configuration names it.
        layers: shape of each attention layer.
        owner: for each layer the layer whose tokens it reads; itself where it owns its tokens.
    """

    id: str
    revision: str | None
    config_hash: str
    architecture: dict[str, Any]
    rope: dict[str, Any]
    layers: tuple[LayerGeometry, ...]
    owner: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError(explain("base_model.id", "name", "non-empty", "nothing"))
        if not 1 <= len(self.layers) <= LAYERS_LIMIT:
            limit = f"between 1 and {LAYERS_LIMIT}"
            raise ValueError(explain("base_model.layers", "length", limit, len(self.layers)))
        if len(self.owner) != len(self.layers):
            expected = f"one entry a layer ({len(self.layers)})"
            raise ValueError(explain("base_model.owner", "length", expected, len(self.owner)))
        for i, layer in enumerate(self.layers):
            largest = max(layer.kv_heads, layer.query_heads, layer.k_dim, layer.v_dim)
            if largest > SIZE_LIMIT:
                limit = f"at most {SIZE_LIMIT}"
                raise ValueError(explain(f"base_model.layers[{i}]", "size", limit, largest))
        expected = _hash(self.architecture, self.rope, self.geometry)
        if self.config_hash != expected:
            raise ValueError(explain("base_model.config_hash", "hash", expected, self.config_hash))

    @property
    def geometry(self) -> ModelGeometry:
        """The shape that the cache sees."""
        return ModelGeometry(self.layers, self.owner)

    @property
    def unshared(self) -> BaseModel:
        """The same model before its layers shared: each reads its own tokens."""
        apart = ModelGeometry(self.layers, tuple(range(len(self.layers))))
        digest = _hash(self.architecture, self.rope, apart)
        return replace(self, config_hash=digest, owner=apart.owner)

    def check(self, other: BaseModel, where: str) -> None:
        """Refuse a model that this bundle was not made for.

        Args:
            other: the model at hand; its id and revision may differ.
            where: the bundle's folder.

        Raises:
            BundleError: the first difference.
        """
        remedy = (
            f"The bundle was made for {self.id}; load that model or export a bundle for this one."
        )
        for what, expected, actual in self._compared(other):
            if expected != actual:
                raise refuse(where, f"base model's {what}", repr(expected), actual, remedy)

    def _compared(self, other: BaseModel) -> list[tuple[str, object, object]]:
        pairs = [
            (
                "model_type",
                self.architecture.get("model_type"),
                other.architecture.get("model_type"),
            ),
            ("layer count", len(self.layers), len(other.layers)),
        ]
        for i, (mine, theirs) in enumerate(zip(self.layers, other.layers, strict=False)):
            for name, value in to_dict(mine).items():
                pairs.append((f"{name} (layer {i})", value, getattr(theirs, name)))
        pairs.append(("layer owners", self.owner, other.owner))
        for mine_, theirs_ in ((self.architecture, other.architecture), (self.rope, other.rope)):
            for name in sorted(mine_.keys() | theirs_.keys()):
                pairs.append((name, mine_.get(name), theirs_.get(name)))
        pairs.append(("config_hash", self.config_hash, other.config_hash))
        return pairs


def base_model(
    config: Mapping[str, Any], geometry: ModelGeometry, id: str, revision: str | None = None
) -> BaseModel:
    """Describe a model.

    Args:
        config: the (text) configuration as plain data, `config.get_text_config().to_dict()`.
        geometry: shape of its layers, `kvsmith.hf.geometry(config)`.
        id: name of the model.
        revision: commit of a hub model.

    Returns:
        BaseModel with its fingerprint.
    """
    architecture = {name: _plain(config[name]) for name in ARCHITECTURE if name in config}
    rope = {name: _plain(config[name]) for name in ROPE if name in config}
    digest = _hash(architecture, rope, geometry)
    return BaseModel(id, revision, digest, architecture, rope, geometry.layers, geometry.owner)


def _hash(architecture: Mapping[str, Any], rope: Mapping[str, Any], geometry: ModelGeometry) -> str:
    data = {"architecture": architecture, "rope": rope, **to_dict(geometry)}
    text = json.dumps(_plain(data), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Plain data in which equal numbers are written alike: 10000.0 becomes 10000."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
