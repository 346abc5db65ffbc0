"""What loading may give, found without the code that loads: json, safetensors and torch alone."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import safetensors.torch
import torch

from kvsmith.bundle import Bundle
from kvsmith.bundle.manifest import CARD, MANIFEST, read_manifest, write_manifest
from kvsmith.strict import to_dict
from tests.fuzz.corpus import Case, Entries, Files, fingerprint, shard_names

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.safetensors|README\.md")


class Wrong(AssertionError):
    """A bundle was loaded that must not be, or gave something else than it holds."""


def judge(bundle: Bundle, case: Case, sound: Bundle) -> None:
    """Whether a bundle that loaded may have.

    Args:
        bundle: what loading gave.
        case: the damaged folder.
        sound: the bundle before the damage.

    Raises:
        Wrong: it may not.
    """
    if case.honest:
        need(same_bundle(bundle, sound), "damage under old checksums changed the content")
        return
    files = _regular(case.entries, bundle)
    data = _manifest(files[MANIFEST])
    checksum = data.pop("checksum")
    need(files[MANIFEST].count(checksum.encode()) == 1, "checksum occurs more than once")
    blank = files[MANIFEST].replace(checksum.encode(), b"0" * 64)
    need(hashlib.sha256(blank).hexdigest() == checksum, "checksum")
    need(same_json(to_dict(bundle.manifest), data), "the manifest reads otherwise")
    again = read_manifest(write_manifest(bundle.manifest), MANIFEST)
    need(again == bundle.manifest, "the manifest is written otherwise")
    need(fingerprint(data["base_model"]) == data["base_model"]["config_hash"], "fingerprint")
    _check_cache(data["cache"])
    _check_tensors(bundle, files, data)


def need(truth: bool, what: str) -> None:
    if not truth:
        raise Wrong(what)


def same_bundle(bundle: Bundle, sound: Bundle) -> bool:
    same = bundle.manifest == sound.manifest and bundle.card == sound.card
    for some, right in (
        (bundle.parameters, sound.parameters),
        (bundle.weights, sound.weights),
    ):
        same = same and list(some) == list(right)
        same = same and all(torch.equal(t, right[n]) for n, t in some.items())
    return same


def same_json(a: Any, b: Any) -> bool:
    """Equal, where 1 and 1.0 are and 1 and true are not."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _regular(entries: Entries, bundle: Bundle) -> Files:
    """The manifest and what it lists, all of them files as the manifest says."""
    listed = bundle.manifest.files
    files = {}
    for name in (MANIFEST, *listed):
        content = entries.get(name)
        need(isinstance(content, bytes), f"{name!r} is no regular file")
        assert isinstance(content, bytes)
        files[name] = content
    for name, info in listed.items():
        need(NAME.fullmatch(name) is not None, f"name {name!r}")
        digest = hashlib.sha256(files[name]).hexdigest()
        need((digest, len(files[name])) == (info.sha256, info.size), f"hash of {name}")
    need(bundle.card.encode() == files.get(CARD, b""), "card")
    return files


def _manifest(raw: bytes) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len(dict(items)) == len(items), "a key twice")
        return dict(items)

    data = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    text = json.dumps(data, allow_nan=False)
    need("\\ud8" not in text or bool(text.encode("utf-8")), "text")
    assert isinstance(data, dict)
    return data


def _check_cache(cache: dict[str, Any]) -> None:
    codec = cache["codec"]
    for tokens in (codec["sinks"], codec["recent"], codec["block_size"], cache["page_size"]):
        need(type(tokens) is int and 0 <= tokens <= 2**20, f"tokens {tokens}")
    need(codec["block_size"] > 0 and cache["page_size"] > 0, "empty blocks")
    need(cache["page_size"] % codec["block_size"] == 0, "blocks in pages")
    for part in (codec["k"], codec["v"]):
        quantizer, outliers = part["quantizer"], part["outliers"]
        if quantizer["kind"] != "identity":
            need(type(quantizer["bits"]) is int and 1 <= quantizer["bits"] <= 8, "bits")
        need(outliers is None or 0 <= outliers["fraction"] < 0.5, "fraction")


def _check_tensors(bundle: Bundle, files: Files, data: dict[str, Any]) -> None:
    delta = data.get("delta") or {"files": [], "dtype": "float32"}
    need(set(delta["files"]) <= set(shard_names(files)), "shards of the delta")
    changed = _joined({name: files[name] for name in delta["files"]})
    need(changed.keys() == bundle.weights.keys(), "names of weights")
    for name, tensor in changed.items():
        need(tensor.dtype == getattr(torch, delta["dtype"]), f"dtype of {name}")
        need(bool(tensor.isfinite().all()), f"{name} is not finite")
        # Finite values that are equal may still differ in the sign of a zero.
        signs = [t.signbit() for t in (tensor, bundle.weights[name])]
        need(torch.equal(tensor, bundle.weights[name]) and torch.equal(*signs), f"bits of {name}")
    own = [name for name in shard_names(files) if name not in delta["files"]]
    found = _joined({name: files[name] for name in own})
    need(found.keys() == bundle.parameters.keys(), "names of tensors")
    need(found.keys() == _names(data), "tensors of the codec")
    for name, tensor in found.items():
        loaded = bundle.parameters[name]
        need(loaded.dtype == tensor.dtype == torch.float32, f"dtype of {name}")
        bits = [t.contiguous().view(torch.int32) for t in (loaded, tensor)]
        need(torch.equal(*bits), f"bits of {name}")
        need(bool(loaded.isfinite().all()), f"{name} is not finite")
        _check_values(name, loaded)


def _joined(shards: Files) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for content in shards.values():
        shard = safetensors.torch.load(content)
        need(not shard.keys() & found.keys(), "a tensor twice")
        found |= shard
    return found


def _names(data: dict[str, Any]) -> set[str]:
    """Tensors by the table of docs/FORMAT.md."""
    names = set()
    for i, owner in enumerate(data["base_model"]["owner"]):
        for part in "kv" if i == owner else "":
            quantizer = data["cache"]["codec"][part]["quantizer"]
            if quantizer["kind"] == "nuq" and quantizer["table"] == "fitted":
                names |= {f"layers.{i}.{part}.lut", f"layers.{i}.{part}.edges"}
            if quantizer.get("range") == "calibrated":
                names |= {f"layers.{i}.{part}.scale", f"layers.{i}.{part}.zero"}
    return names


def _check_values(name: str, tensor: torch.Tensor) -> None:
    values = tensor.flatten().tolist()
    if name.endswith("lut"):
        need(all(a < b for a, b in zip(values, values[1:], strict=False)), f"order of {name}")
    if name.endswith("edges"):
        need(all(a <= b for a, b in zip(values, values[1:], strict=False)), f"order of {name}")
    if name.endswith("scale"):
        need(min(values) > 0, f"sign of {name}")
