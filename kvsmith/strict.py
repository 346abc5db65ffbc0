"""Plain data <-> frozen dataclasses, strictly: wrong keys, types and gaps are errors with a path.

One reader serves YAML configuration, bundle manifests and keyword arguments. Tagged unions are
written `{"kind": "nuq", ...}`: each member dataclass carries `kind: Literal["nuq"] = "nuq"` as its
first field.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from kvsmith.errors import explain

T = TypeVar("T")
_ADDED = "added_later"
# Resolved types of a dataclass's fields; resolving them takes longer than everything else here.
_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def added_later(default: Any) -> Any:
    """A dataclass field that older files lack: plain data leave it out where it holds `default`, so
    that what does not use it keeps its bytes.
    """
    return dataclasses.field(default=default, metadata={_ADDED: True})


def from_dict(cls: type[T], data: object, where: str) -> T:
    """Build the dataclass `cls` from plain data.

    Args:
        cls: a dataclass; its field types may be int, float, bool, str, None, Literal, other
            dataclasses, tuples, `dict[str, X]`, optionals and tagged unions of dataclasses.
        data: a mapping from field names to plain data.
        where: dotted path that error messages begin with.

    Returns:
        An instance; `__post_init__` checks of the dataclass have run.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a key is unknown or missing, or a value is not allowed.
    """
    if not isinstance(data, Mapping):
        raise TypeError(explain(where, cls.__name__, "a mapping", type(data).__name__))
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    for key in data:
        if key not in fields:
            raise ValueError(
                explain(
                    where, "key", f"one of {', '.join(fields)}", repr(key), _near(str(key), fields)
                )
            )
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _read(hints[name], data[name], f"{where}.{name}" if where else name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(explain(where, f"key {name!r}", "present", "nothing"))
    return cls(**values)


def to_dict(value: object) -> Any:
    """Turn a dataclass into plain data that `from_dict` reads back to an equal object.

    Args:
        value: a dataclass instance, or a value found in one.

    Returns:
        dict, list, int, float, bool, str or None.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: to_dict(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.init and not (_ADDED in f.metadata and getattr(value, f.name) == f.default)
        }
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    return value


def _near(key: str, names: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(key, list(names), n=2)
    return f"Did you mean {' or '.join(close)}?" if close else ""


def _read(hint: Any, value: object, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _read_union(typing.get_args(hint), value, where)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if not any(value == a and type(value) is type(a) for a in allowed):
            names = [str(a) for a in allowed]
            near = _near(str(value), names)
            raise ValueError(
                explain(where, "value", f"one of {', '.join(names)}", repr(value), near)
            )
        return value
    if origin is tuple:
        return _read_tuple(typing.get_args(hint), value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(explain(where, "value", "a mapping", type(value).__name__))
        return {
            str(k): _read(typing.get_args(hint)[1], v, f"{where}.{k}") for k, v in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value, where)
    return _read_scalar(hint, value, where)


def _read_union(members: tuple[Any, ...], value: object, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    members = tuple(m for m in members if m is not type(None))
    tagged: dict[str, Any] = {
        _hints(m)["kind"].__args__[0]: m
        for m in members
        if dataclasses.is_dataclass(m) and "kind" in _hints(m)
    }
    if len(members) == 1:
        return _read(members[0], value, where)
    if not tagged:
        return _read_scalar(members, value, where)
    if not isinstance(value, Mapping) or "kind" not in value:
        raise TypeError(
            explain(where, "value", f"a mapping with kind = {', '.join(tagged)}", repr(value))
        )
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in tagged:
        names, near = ", ".join(tagged), _near(str(kind), tagged)
        raise ValueError(explain(f"{where}.kind", "value", f"one of {names}", repr(kind), near))
    return from_dict(tagged[kind], value, where)


def _read_tuple(args: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(explain(where, "value", "a list", type(value).__name__))
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_read(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(args) != len(value):
        raise ValueError(explain(where, "length", str(len(args)), len(value)))
    return tuple(
        _read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
    )


def _read_scalar(hint: Any, value: object, where: str) -> Any:
    allowed = hint if isinstance(hint, tuple) else (hint,)
    if Any in allowed:
        return value
    if type(value) in allowed:
        return value
    if float in allowed and type(value) is int and abs(value) <= sys.float_info.max:
        number = float(value)
        if number == value:  # else digits would go without a word
            return number
    names = " or ".join(getattr(a, "__name__", str(a)) for a in allowed)
    raise TypeError(
        explain(where, "value", f"of type {names}", f"{value!r} ({type(value).__name__})")
    )
