"""Reads pickles of plain containers, numpy arrays and torch tensors; nothing in them is executed.

`pickletools.genops` splits a pickle into its instructions, and a small stack machine here follows
them. A pickle asks for functions by name; every name that is not in a short list is refused, and
the names in it stand for our own code, so that no import and no call ever comes from the file.

Source: the instructions are documented in Python's pickletools; torch's pickled storages are its
format of before 1.6: five pickles and then, for each storage, 8 bytes of length and the values.
"""

from __future__ import annotations

import io
import math
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kvsmith.errors import explain

LIMIT = 2**31  # bytes of a file
MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
# What nonsense raises on its way through the machine; RecursionError is a RuntimeError.
BROKEN = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError)
DTYPES = ("f8", "f4", "f2", "i8", "i4", "u1", "b1")


def read_pickle(path: Path) -> Any:
    """Read a pickle.

    Args:
        path: the file.

    Returns:
        Dicts, lists, tuples, numbers, strings, bytes, None, and tensors (arrays become tensors).

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or too large, or asks for anything that is not in the list; names
            it.
    """
    if not path.is_file():
        raise FileNotFoundError(explain(str(path), "file", "present", "nothing"))
    if path.stat().st_size > LIMIT:
        raise ValueError(explain(str(path), "size", f"at most {LIMIT} bytes", path.stat().st_size))
    with path.open("rb") as file:
        return _Machine(str(path)).run(file)


def read_torch(path: Path) -> Any:
    """Read what torch's own `save` wrote (since 1.6): an archive of one pickle and the storages.

    Args, returns and raises as of `read_pickle`.
    """
    if not path.is_file():
        raise FileNotFoundError(explain(str(path), "file", "present", "nothing"))
    try:
        with zipfile.ZipFile(path) as archive:
            inside = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in inside if name.endswith("/data.pkl")]
            if len(pickles) != 1 or sum(e.file_size for e in inside.values()) > LIMIT:
                raise ValueError(explain(str(path), "content", "one pickle", len(pickles)))
            folder = pickles[0].removesuffix("data.pkl")

            def storage(key: str) -> bytes:
                return archive.read(f"{folder}data/{key}")

            return _Machine(str(path), storage).run(io.BytesIO(archive.read(pickles[0])))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(explain(str(path), "file", "an archive of torch", str(error))) from error


@dataclass(frozen=True)
class _Name:
    """A function or class that a pickle asks for; a word, never the thing."""

    module: str
    name: str


@dataclass
class _Dtype:
    """A numpy dtype by its code."""

    code: str


@dataclass
class _Array:
    """An array whose content follows in a BUILD instruction."""

    value: Tensor | None = None


@dataclass(frozen=True)
class _Storage:
    """Values of tensors, one after the other."""

    values: Tensor


class _Mark:
    """Where a group of values on the stack begins."""


class _Machine:
    """The stack machine of one pickle.

    Args:
        where: the file, for errors.
        storage: gives the bytes of a storage by its key; None where a pickle may not refer to any.
    """

    def __init__(self, where: str, storage: Callable[[str], bytes] | None = None) -> None:
        self._where, self._storage = where, storage
        self._wanted: dict[str, tuple[torch.dtype, int]] = {}

    def run(self, file: BinaryIO) -> Any:
        """Follow the instructions up to STOP; the file stands behind it then."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        try:
            for code, argument, _ in _instructions(file):
                if code.name == "STOP":
                    return _finished(stack.pop())
                self._step(code.name, argument, stack, memo)
        except _Refused:
            raise
        except BROKEN as error:
            reason = f"broken ({' '.join(str(error).split())[:120]})"
            raise self._refuse("pickle", "whole", reason) from error
        raise self._refuse("pickle", "whole", "cut short")

    def _refuse(self, what: str, expected: str, actual: object) -> ValueError:
        remedy = "Only quantizers as KVQuant writes them are read, and nothing in them is run."
        return _Refused(explain(self._where, what, expected, actual, remedy))

    def _step(self, code: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
        if code in _CONSTANTS:
            stack.append(_CONSTANTS[code]())
        elif code in _VALUES:
            stack.append(argument)
        elif code in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            memo[len(memo) if code == "MEMOIZE" else argument] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            if code == "GLOBAL":
                module, name = argument.split(" ", 1)
            else:
                name, module = stack.pop(), stack.pop()
            stack.append(self._name(module, name))
        elif code == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif code == "BUILD":
            state = stack.pop()
            self._build(stack[-1], state)
        elif code == "BINPERSID":
            stack.append(self._persistent(stack.pop()))
        elif code in _GROUPS:
            _GROUPS[code](stack)
        elif code not in ("PROTO", "FRAME"):
            raise self._refuse("instruction", "one of plain data", code)

    def _name(self, module: str, name: str) -> _Name:
        found = _Name(module, name)
        storage = module == "torch" and name in STORAGES and self._storage is not None
        if found not in _CALLS and found not in _TYPES and not storage:
            raise self._refuse("type", "a number, container, array or tensor", f"{module}.{name}")
        return found

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Name) or function not in _CALLS:
            raise self._refuse("call", "one that makes an array or a tensor", repr(function)[:80])
        if function == _LOAD:
            return self._legacy(arguments[0])
        return _CALLS[function](*arguments)

    def _build(self, target: Any, state: Any) -> None:
        if isinstance(target, _Dtype):
            if state[1] not in ("<", "|"):
                raise self._refuse("dtype", "little-endian", state[1])
            return
        if not isinstance(target, _Array):
            raise self._refuse("object", "an array", type(target).__name__)
        _, shape, dtype, fortran, data = state
        target.value = _tensor(data, dtype, shape, "F" if fortran else "C")

    def _persistent(self, key: Any) -> _Storage:
        """A storage, by the identifier that torch writes."""
        if self._storage is None:
            raise self._refuse("reference", "none", "a persistent identifier")
        _, kind, name, _, count = key[:5]
        dtype = STORAGES[kind.name]
        self._wanted[name] = (dtype, count)
        return _values(self._storage(name), dtype)

    def _legacy(self, data: bytes) -> _Storage:
        """A storage in torch's format of before 1.6."""
        file, inner = io.BytesIO(data), _Machine(self._where, lambda _: b"")
        if inner.run(file) != MAGIC:
            raise self._refuse("storage", "in torch's format", "something else")
        inner.run(file)  # protocol
        inner.run(file)  # sizes of the writer's machine
        inner.run(file)  # the storage itself, a persistent identifier
        keys = inner.run(file)
        if len(keys) != 1:
            raise self._refuse("storage", "a single one", len(keys))
        dtype, count = inner._wanted[keys[0]]
        if int.from_bytes(file.read(8), "little") != count:
            raise self._refuse("storage", f"{count} values", "another number")
        return _values(file.read(count * dtype.itemsize), dtype)


def _instructions(file: BinaryIO) -> Iterator[Any]:
    """The instructions of one pickle; warnings about odd escapes in them say nothing to a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from pickletools.genops(file)


class _Refused(ValueError):
    """A pickle that is not read; its message is complete."""


def _mark(stack: list[Any]) -> list[Any]:
    """Take the values above the last mark, and the mark."""
    values: list[Any] = []
    while not isinstance(value := stack.pop(), _Mark):
        values.append(value)
    return values[::-1]


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2], strict=True))


def _take(stack: list[Any], count: int) -> None:
    values = tuple(stack[len(stack) - count :])
    del stack[len(stack) - count :]
    stack.append(values)


def _into(stack: list[Any], group: list[Any], kind: type) -> None:
    target = stack[-1]
    if isinstance(target, list) and kind is list:
        target.extend(group)
    elif isinstance(target, dict) and kind is dict:
        target.update(_pairs(group))
    else:
        raise ValueError(f"{kind.__name__} expected")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": _Mark,
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "SHORT_BINSTRING", "BINSTRING"),
}
_GROUPS: dict[str, Callable[[list[Any]], None]] = {
    "TUPLE1": lambda s: _take(s, 1),
    "TUPLE2": lambda s: _take(s, 2),
    "TUPLE3": lambda s: _take(s, 3),
    "TUPLE": lambda s: s.append(tuple(_mark(s))),
    "LIST": lambda s: s.append(_mark(s)),
    "DICT": lambda s: s.append(_pairs(_mark(s))),
    "APPEND": lambda s: _into(s, [s.pop()], list),
    "APPENDS": lambda s: _into(s, _mark(s), list),
    "SETITEM": lambda s: _into(s, [s.pop(), s.pop()][::-1], dict),
    "SETITEMS": lambda s: _into(s, _mark(s), dict),
    "POP": lambda s: s.pop() and None,
}


def _tensor(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> Tensor:
    """An array's bytes as a tensor of their own."""
    if dtype.code not in DTYPES:
        raise ValueError(f"dtype {dtype.code}")
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    array = np.frombuffer(raw, dtype=f"<{dtype.code}").reshape(shape, order=order)  # type: ignore[call-overload]
    return torch.from_numpy(array.copy())


def _values(raw: bytes, dtype: torch.dtype) -> _Storage:
    """A storage of its bytes; too few show when a tensor asks for what is not there."""
    whole = len(raw) // dtype.itemsize
    if not whole:
        return _Storage(torch.zeros(0, dtype=dtype))
    return _Storage(torch.frombuffer(bytearray(raw), dtype=dtype, count=whole))


def _view(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor of a storage, copied; its extent must lie inside."""
    values = storage.values
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    count = math.prod(size)
    if min((offset, *stride, *size)) < 0 or count > len(values) or (count and last >= len(values)):
        raise ValueError("tensor beyond its storage")
    return values.as_strided(tuple(size), tuple(stride), offset).clone()


def _scalar(dtype: _Dtype, data: Any) -> float:
    return float(_tensor(data, dtype, (), "C"))


_LOAD = _Name("torch.storage", "_load_from_bytes")
_TYPES = {_Name("numpy", "ndarray")}
_CALLS: dict[_Name, Callable[..., Any]] = {
    _LOAD: bytes,
    _Name("torch._utils", "_rebuild_tensor_v2"): _view,
    _Name("collections", "OrderedDict"): dict,
    _Name("numpy", "dtype"): lambda code, *_: _Dtype(str(code).lstrip("<|=")),
    _Name("_codecs", "encode"): lambda text, name: text.encode("latin1"),
}
for _module in ("numpy.core", "numpy._core"):
    _CALLS[_Name(f"{_module}.multiarray", "_reconstruct")] = lambda *_: _Array()
    _CALLS[_Name(f"{_module}.multiarray", "scalar")] = _scalar
    _CALLS[_Name(f"{_module}.numeric", "_frombuffer")] = _tensor


def _finished(value: Any) -> Any:
    """Plain data with tensors for arrays."""
    if isinstance(value, dict):
        return {k: _finished(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_finished(v) for v in value)
    return value.value if isinstance(value, _Array) else value
