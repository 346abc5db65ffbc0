"""Several devices where there is one: tensors compute on the CPU and say that they lie elsewhere.

A device is `meta:0`, `meta:1`, ...; an operation on tensors of two of them fails, as on GPUs (where
tensors without dimensions mix, too). Tensors remember the truth in `inner`.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten


class Placed(torch.Tensor):
    """A tensor that says it lies on a device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Self:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """Within, new tensors lie where they are asked for."""

    def __enter__(self) -> Self:
        # torch.tensor(data, device=...) then copies where this mode sees it
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._before)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    placed: list[Placed] = []
    others: list[torch.Tensor] = []

    def unwrap(x: Any) -> Any:
        if isinstance(x, Placed):
            placed.append(x)
            return x.inner
        if isinstance(x, torch.Tensor) and x.dim():
            others.append(x)
        return x

    plain_args, plain = tree_map(unwrap, (args, kwargs))
    device = _where(func, placed, others, kwargs.get("device"))
    if plain.get("device") is not None:
        plain["device"] = torch.device("cpu")
    known = {id(x.inner): x for x in placed}
    made = func(*plain_args, **plain)

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, Placed):
            return x
        if id(x) in known:  # written in place
            return known[id(x)]
        return x if device is None or device.type == "cpu" else Placed(x, device)

    return tree_map(wrap, made)


def _where(
    func: Any, placed: list[Placed], others: list[torch.Tensor], asked: Any
) -> torch.device | None:
    """Where the result lies.

    Raises:
        RuntimeError: the operands lie on several devices.
    """
    if asked is not None:
        return torch.device(asked)
    if not placed:
        return None
    if func.overloadpacket is aten.copy_:  # may cross devices
        return placed[0].device
    found = {x.device for x in placed if x.dim()} or {placed[0].device}
    if len(found) > 1 or (others and any(x.dim() for x in placed)):
        raise RuntimeError(f"{func}: operands on {found} and {len(others)} on the CPU")
    return found.pop()


def place(module: nn.Module, device: torch.device) -> None:
    """Put weights and buffers of a module on a device."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and not isinstance(weight.data, Placed):
                part._parameters[name] = nn.Parameter(Placed(weight.data, device), False)
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, Placed):
                part._buffers[name] = Placed(buffer, device)


def spread(model: Any, layers: list[nn.Module], count: int) -> list[torch.device]:
    """Spread a model as `device_map=auto` does: layers in order over `count` devices, what goes
    into a layer sent to its device by accelerate. Gives the device of each layer.
    """
    devices = [torch.device("meta", i * count // len(layers)) for i in range(len(layers))]
    for layer, device in zip(layers, devices, strict=True):
        place(layer, device)
        layer.register_forward_pre_hook(_send(device), with_kwargs=True)
    place(model, devices[0])  # the rest: embeddings, rotary module, norm and head
    for part in (model.model.norm, model.lm_head):
        part.register_forward_pre_hook(_send(devices[0]), with_kwargs=True)
    return devices


def _send(device: torch.device) -> Any:
    def send(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return send_to_device(args, device), send_to_device(
            kwargs, device, skip_keys="past_key_values"
        )

    return send
