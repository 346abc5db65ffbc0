"""The strict reader: what it accepts comes back equal, what it refuses it refuses in one line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsmith.errors import explain
from kvsmith.strict import from_dict, to_dict


@dataclass(frozen=True)
class Uniform:
    kind: Literal["uniform"] = "uniform"
    bits: Literal[2, 4] = 4


@dataclass(frozen=True)
class Nuq:
    kind: Literal["nuq"] = "nuq"
    fraction: float = 0.01


@dataclass(frozen=True)
class Inner:
    name: str
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spec:
    layers: int
    quantizer: Uniform | Nuq = Uniform()
    inner: Inner | None = None
    pair: tuple[int, str] = (1, "a")
    table: dict[str, Inner] = field(default_factory=dict)
    enabled: bool = True
    limit: int | str = 0
    derived: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(explain("layers", "value", "positive", self.layers))


_inner = st.builds(Inner, st.text(), st.lists(st.integers()).map(tuple))
_specs = st.builds(
    Spec,
    layers=st.integers(min_value=1),
    quantizer=st.builds(Uniform, bits=st.sampled_from([2, 4]))
    | st.builds(Nuq, fraction=st.floats(allow_nan=False)),
    inner=st.none() | _inner,
    pair=st.tuples(st.integers(), st.text()),
    table=st.dictionaries(st.text(), _inner, max_size=3),
    enabled=st.booleans(),
    limit=st.integers() | st.text(),
)


@given(_specs)
def test_round_trip_through_json(spec: Spec) -> None:
    assert from_dict(Spec, json.loads(json.dumps(to_dict(spec))), "spec") == spec


_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
_names = st.sampled_from([*Spec.__dataclass_fields__, "kind", "name", "extra"])
_kinds = st.fixed_dictionaries({"kind": st.sampled_from(["uniform", "nuq"]) | _plain})


@given(st.dictionaries(_names, _plain | _kinds) | _plain)
def test_anything_is_read_or_refused_in_one_line(data: Any) -> None:
    try:
        spec = from_dict(Spec, data, "spec")
    except (TypeError, ValueError) as error:
        assert " must be " in str(error) and "\n" not in str(error)
    else:
        assert spec.layers >= 1


@pytest.mark.parametrize(
    ("data", "error", "line"),
    [
        ([], TypeError, "spec: Spec must be a mapping, got list."),
        ({}, ValueError, "spec: key 'layers' must be present, got nothing."),
        ({"layers": True}, TypeError, "spec.layers: value must be of type int, got True (bool)."),
        ({"layers": 2.0}, TypeError, "spec.layers: value must be of type int, got 2.0 (float)."),
        ({"layers": 0}, ValueError, "layers: value must be positive, got 0."),
        ({"derived": 1}, ValueError, "got 'derived'."),
        ({"layer": 1}, ValueError, "got 'layer'. Did you mean layers?"),
        ({"inner": {"nam": "x"}}, ValueError, "spec.inner: key must be one of name, values, got"),
        ({"inner": {"name": "x", "values": [1, "2"]}}, TypeError, "spec.inner.values[1]: value"),
        ({"inner": {"name": "x", "values": "12"}}, TypeError, "values: value must be a list"),
        ({"pair": [1]}, ValueError, "spec.pair: length must be 2, got 1."),
        ({"table": {"a": 1}}, TypeError, "spec.table.a: Inner must be a mapping, got int."),
        ({"table": []}, TypeError, "spec.table: value must be a mapping, got list."),
        ({"limit": None}, TypeError, "spec.limit: value must be of type int or str, got None"),
        ({"quantizer": None}, TypeError, "a mapping with kind = uniform, nuq, got None."),
        ({"quantizer": {}}, TypeError, "spec.quantizer: value must be a mapping with kind"),
        ({"quantizer": {"kind": "nug"}}, ValueError, "got 'nug'. Did you mean nuq?"),
        ({"quantizer": {"kind": ["nuq"]}}, ValueError, "spec.quantizer.kind: value must be one of"),
        ({"quantizer": {"kind": "uniform", "bits": 3}}, ValueError, "must be one of 2, 4, got 3."),
        ({"quantizer": {"kind": "uniform", "bits": 4.0}}, ValueError, "one of 2, 4, got 4.0."),
        ({"quantizer": {"kind": "nuq", "bits": 4}}, ValueError, "spec.quantizer: key must be one"),
        ({"quantizer": {"kind": "nuq", "fraction": 10**400}}, TypeError, "must be of type float"),
        ({"quantizer": {"kind": "nuq", "fraction": 2**53 + 1}}, TypeError, "must be of type float"),
    ],
)
def test_refusals_name_the_path(data: Any, error: type[Exception], line: str) -> None:
    whole = {"layers": 1} | data if data else data
    with pytest.raises(error) as caught:
        from_dict(Spec, whole, "spec")
    assert line in str(caught.value)


def test_missing_key_is_reported_before_the_defaults_apply() -> None:
    with pytest.raises(ValueError, match="spec.inner: key 'name' must be present"):
        from_dict(Spec, {"layers": 1, "inner": {}}, "spec")


def test_whole_numbers_are_floats_too() -> None:
    read = from_dict(Nuq, {"fraction": 1}, "")
    assert read.fraction == 1.0 and type(read.fraction) is float


def test_explain_is_one_line() -> None:
    line = explain("codec.k", "bits", "one of 2, 3, 4", 5, "Set codec.k.bits=4.")
    assert line == "codec.k: bits must be one of 2, 3, 4, got 5. Set codec.k.bits=4."
    assert "\n" not in explain("a", "b", "c", torch.zeros(20, 20), "d\n e")
