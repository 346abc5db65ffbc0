"""Bundles that hypothesis makes up: what loads is what the file says, and what is sound loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import kvsmith
from kvsmith.bundle import BundleError, expected_tensors
from kvsmith.bundle.manifest import MANIFEST, SHARD
from kvsmith.bundle.shards import encode
from kvsmith.bundle.strict_json import read_object
from tests.fuzz.campaign import _placed
from tests.fuzz.corpus import Case, Entries, corpus, resealed, seal_data, sealed, split
from tests.fuzz.oracle import judge
from tests.fuzz.text import places
from tests.golden import GEOMETRY, GOLDEN, golden_parameters, golden_spec

many = settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
SOUND = kvsmith.load(GOLDEN)
EXPECTED = expected_tensors(golden_spec(), GEOMETRY)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name, content in corpus()[0].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def load(home: Path, entries: Entries, honest: bool = False) -> bool:
    """Whether the damaged folder loads; if so it was judged."""
    with _placed(home, corpus()[0], entries):
        try:
            bundle = kvsmith.load(home)
        except BundleError as error:
            assert str(error).isprintable() and len(str(error)) < 1200
            return False
    judge(bundle, Case("hypothesis", entries, honest), SOUND)
    return True


@many
@given(st.dictionaries(st.text(), plain))
@example({"a": 1e308, "b": -0.0, "c": [[{}]], "\u2028": "\U0001f600"})
def test_json_that_is_sound_is_read(data: dict[str, Any]) -> None:
    for ascii_ in (True, False):
        raw = json.dumps(data, ensure_ascii=ascii_).encode("utf-8")
        assert read_object(raw, "text") == data


@many
@given(st.binary() | st.text('{}[]",:0123456789eE+-.\\u nultrefas\n').map(str.encode))
@example(b'{"a": 1, "a": 1}')
@example(b'{"a": NaN}')
@example(b"\xef\xbb\xbf{}")
def test_any_bytes_are_read_as_json_reads_them_or_refused(raw: bytes) -> None:
    try:
        data = read_object(raw, "text")
    except BundleError:
        return
    assert data == json.loads(raw.decode("utf-8"))


@many
@given(st.integers(0), plain)
def test_any_value_anywhere_in_a_manifest(home: Path, place: int, value: Any) -> None:
    data, rest = split(corpus()[0])
    spots = list(places(data))
    container, key = spots[place % len(spots)]
    container[key] = value
    load(home, {**rest, MANIFEST: seal_data(data)})


@many
@given(st.binary(max_size=200), st.integers(0), st.integers(0, 40))
def test_any_bytes_anywhere_in_a_manifest(home: Path, new: bytes, at: int, cut: int) -> None:
    raw = corpus()[0][MANIFEST]
    start = at % len(raw)
    load(home, {**corpus()[0], MANIFEST: resealed(raw[:start] + new + raw[start + cut :])})


@many
@given(
    st.binary(max_size=200),
    st.integers(0),
    st.integers(0, 40),
    st.sampled_from(sorted(corpus()[0])),
)
def test_any_bytes_anywhere_under_old_checksums(
    home: Path, new: bytes, at: int, cut: int, name: str
) -> None:
    raw = corpus()[0][name]
    start = at % len(raw)
    changed = raw[:start] + new + raw[start + cut :]
    loaded = load(home, {**corpus()[0], name: changed}, honest=True)
    assert loaded == (changed == raw)


sizes = st.sampled_from((0, 1, 2, 3, 7, 8, 16, 32, 2**31, 2**62, 2**63, -1)) | st.integers()
entries_of_a_header = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(("F32", "F32", "F16", "I64", "BOOL", "")) | plain,
        "shape": st.lists(sizes, max_size=4) | plain,
        "data_offsets": st.lists(sizes, max_size=3) | plain,
    },
    optional={"x": plain},
)


@many
@given(
    st.dictionaries(st.sampled_from(sorted(EXPECTED)) | st.text(), entries_of_a_header | plain),
    st.booleans(),
    st.integers(-16, 16),
)
def test_any_header(home: Path, changes: dict[str, Any], keep: bool, lie: int) -> None:
    raw = corpus()[0][SHARD]
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end]) if keep else {}
    text = json.dumps({**header, **changes}).encode()
    length = max(0, len(text) + (lie if abs(lie) > 8 else 0)).to_bytes(8, "little")
    data, rest = split(corpus()[0])
    load(home, sealed(data, {**rest, SHARD: length + text + raw[end:]}))


singles = st.floats(width=32) | st.sampled_from((0.0, -0.0, 1.0, 3e38, -3e38, 1e-45))


@many
@given(st.sampled_from(sorted(EXPECTED)), st.data())
def test_parameters_load_if_and_only_if_they_are_sound(
    home: Path, name: str, draw: st.DataObject
) -> None:
    tensors = golden_parameters(golden_spec(), GEOMETRY)
    flat = tensors[name].flatten()
    fresh = draw.draw(st.dictionaries(st.integers(0, len(flat) - 1), singles, min_size=1))
    for i, value in fresh.items():
        flat[i] = value
    if draw.draw(st.booleans()):
        flat = flat.sort().values
    tensors[name] = flat.view(tensors[name].shape)
    data, rest = split(corpus()[0])
    loaded = load(home, sealed(data, {**rest, SHARD: encode(tensors)}))
    assert loaded == sound(name, tensors)


def sound(name: str, tensors: dict[str, torch.Tensor]) -> bool:
    """The sentences of docs/FORMAT.md on the tensors of one layer, in Python's own numbers."""
    prefix = name.rpartition(".")[0]
    own = {n: tensors[f"{prefix}.{n}"].flatten().tolist() for n in ("lut", "edges")}
    lut, edges = own["lut"], own["edges"]
    if not all(map(math.isfinite, lut + edges)):
        return False
    if any(a >= b for a, b in zip(lut, lut[1:], strict=False)):
        return False
    if any(a > b for a, b in zip(edges, edges[1:], strict=False)):
        return False
    if prefix.endswith("v"):
        return True  # q_norm, and a range that is not calibrated
    if any(not lut[i] <= edge <= lut[i + 1] for i, edge in enumerate(edges)):
        return False
    scale, zero = (tensors[f"{prefix}.{n}"] for n in ("scale", "zero"))
    if not all(0 < s < math.inf for s in scale.flatten().tolist()):
        return False
    if not all(map(math.isfinite, zero.flatten().tolist())):
        return False
    reach = torch.tensor(max(1.0, *(abs(c) for c in lut)))
    return bool((zero.abs() + scale * reach).isfinite().all())
