"""Position ids that count up by one with the columns, and RoPE as revolutions a position.

That is what nearly every text has, and what a kernel needs to rotate keys without being told the
position of each.
"""

from __future__ import annotations

import math

import torch

from kvsmith.kernels.attend_encoded.api import Rope
from kvsmith.pairing import Pairing
from kvsmith.rope import Positions, RotarySource, TableSource
from kvsmith.sinks import sink_columns


def regular_rope(
    positions: Positions,
    source: RotarySource | TableSource,
    stop: int,
    padding: torch.Tensor | None,
    q: torch.Tensor,
    pairing: Pairing,
) -> Rope | None:
    """RoPE of the columns before `stop`, as the kernel takes it.

    Args:
        positions: position ids of all columns.
        source: makes cos and sin.
        stop: columns that matter, at least 1.
        padding: [B] int64, left padding, whose ids do not matter; None for none.
        q: [B, Hq, T, D] the queries.
        pairing: their pairs.

    Returns:
        None where ids have gaps, or the frequencies change or cannot be told.
    """
    if positions.epochs or isinstance(source, TableSource):
        return None
    shift, (rows, _, _, dim) = _shift(positions, stop, padding), q.shape
    key = (source, dim, q.device)
    if key not in positions.turns:
        found = _turns(source, pairing, positions.pages[0].device)
        positions.turns[key] = found and (found[0].to(q.device), found[1])
    found = positions.turns[key]
    if shift is None or found is None:
        return None
    own = positions.shared(("shift", stop, q.device), lambda: shift.to(q.device))
    return Rope(found[0], found[1], own.expand(rows).contiguous())


def window_ids(
    positions: Positions,
    sinks: int,
    padding: torch.Tensor | None,
    start: int,
    room: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids of the dense windows, made once a forward pass.

    Args:
        positions: position ids of all columns.
        sinks: first tokens of a row.
        padding: see `regular_rope`.
        start: first column of the recent window.
        room: columns that it has room for.
        device: where the ids are wanted.

    Returns:
        [B or 1, sinks] and [B or 1, room] int64; zeros at columns that are not there yet.
    """

    def of_sinks() -> torch.Tensor:
        if padding is None:
            few = positions.window(0, max(1, min(sinks, positions.length)))
            return _padded(few, sinks).to(device)
        columns = sink_columns(padding.to(positions.pages[0].device), sinks)
        every = positions.window(0, positions.length).expand(len(columns), -1)
        return every.gather(1, columns.clamp(max=positions.length - 1)).to(device)

    def of_recent() -> torch.Tensor:
        ids = _padded(positions.window(start, min(start + room, positions.length)), room)
        ids = ids.to(device)
        return ids if padding is None else ids.expand(len(padding), -1).contiguous()

    key = ("sinks", sinks, device), ("recent", start, room, device)
    return positions.shared(key[0], of_sinks), positions.shared(key[1], of_recent)


def _padded(ids: torch.Tensor, room: int) -> torch.Tensor:
    return torch.nn.functional.pad(ids, (0, room - ids.shape[1]))  # or cut


def _shift(positions: Positions, stop: int, padding: torch.Tensor | None) -> torch.Tensor | None:
    """[rows] int64 position id minus column, if the same at all columns before `stop`.

    Columns are looked at once, when a block of them is new: the answer has to reach the host.
    """
    seen, known = positions.regular
    if stop <= seen or (seen and known is None):
        return known
    shift, ok = _look(positions, seen, stop, padding)
    if known is not None and ok and not torch.equal(shift, known):
        # A row of padding alone tells nothing, and the first token then tells another shift.
        shift, ok = _look(positions, 0, stop, padding)
    positions.regular = (stop, shift if ok else None)
    return positions.regular[1]


def _look(
    positions: Positions, start: int, stop: int, padding: torch.Tensor | None
) -> tuple[torch.Tensor, bool]:
    """The shift that the last column tells, and whether it is that of all from `start` on."""
    ids = positions.window(start, stop)
    columns = torch.arange(start, stop, device=ids.device)
    shift = ids[:, -1] - columns[-1]
    same = ids - columns == shift[:, None]
    if padding is not None:
        same = same | (columns < padding.to(ids.device)[:, None])
    return shift, bool(same.all())


def _turns(
    source: RotarySource | TableSource, pairing: Pairing, device: torch.device
) -> tuple[torch.Tensor, float] | None:
    """[D / 2] float64 revolutions a position of each pair, and the factor on rotated keys.

    Read from the module, whose frequencies are exact, and checked against what it makes of
    positions 0 and 1.
    """
    assert isinstance(source, RotarySource)
    cos, sin = (x[0].double() for x in source(torch.tensor([[0, 1]], device=device), torch.float32))
    scale, width = float(cos[0, 0]), cos.shape[-1]
    if scale != 1 and bool((pairing.entry == width).any()):
        return None  # on rotated channels alone
    for name, buffer in source.module.named_buffers():
        if not name.endswith("inv_freq") or "original" in name or width % buffer.numel():
            continue
        angle, times = buffer.double().flatten().to(device), width // buffer.numel()
        # An entry each, or two, side by side or half of the width apart.
        for entries in (angle.repeat(times), angle.repeat_interleave(times)):
            wanted = scale * torch.stack([entries.cos(), entries.sin()])
            got = torch.stack([cos[1], sin[1]])
            if torch.allclose(got, wanted, rtol=0, atol=1e-6 * abs(scale)):
                return pairing.of(entries, 0.0) / (2 * math.pi), scale
    return None
