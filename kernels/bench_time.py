"""Timing of kernels: statistics, graphs, rotated inputs, and what they are compared with."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Call = Callable[[], object]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ROTATED_BYTES = 512 << 20  # several times the L2 of any device


@dataclass(frozen=True)
class Spread:
    """Times of one call, seconds: 20th, 50th and 80th percentile of n samples."""

    p20: float
    p50: float
    p80: float
    n: int


def spread(samples: Sequence[float]) -> Spread:
    """Percentiles by linear interpolation; samples in seconds, at least one."""
    times = torch.tensor(samples, dtype=torch.float64)
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Spread(p20, p50, p80, len(samples))


def copies_beyond_cache(nbytes: int) -> int:
    """Sets of inputs of `nbytes` that no cache holds together: 1 to 64."""
    return min(max(-(-ROTATED_BYTES // max(nbytes, 1)), 1), 64)


def time_calls(calls: Sequence[Call], device: torch.device, seconds: float) -> Spread:
    """Time calls that do the same work on different memory.

    Args:
        calls: run one after another, so that each meets cold caches.
        device: a GPU, where they are captured in one graph and timed by events, or the CPU.
        seconds: how long to sample; at least five samples.

    Returns:
        Spread of the time of one call.
    """
    for call in calls:
        call()
    once = _graphed(calls) if device.type == "cuda" else (lambda: [c() for c in calls])
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < end:
        samples.append(_seconds(once, device) / len(calls))
    return spread(samples)


def _graphed(calls: Sequence[Call]) -> Call:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _seconds(once: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        once()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    once()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def copy_bandwidth(device: torch.device, nbytes: int, seconds: float) -> float:
    """Bytes read and written a second by a device-to-device copy of `nbytes`."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / time_calls([lambda: target.copy_(source)], device, seconds).p50


def best_sdpa(
    dense: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    mask: torch.Tensor | None,
    seconds: float,
) -> tuple[str, Spread] | None:
    """The fastest of torch's attention kernels on a dense cache.

    Args:
        dense: sets of (q [B, Hq, 1, D], k, v [B, H, C, D]).
        mask: [B, 1, 1, C] bool, or None where all rows are full.
        seconds: how long to sample each.

    Returns:
        (backend, spread); backends that refuse are left out; None where all do.
    """
    found: dict[str, Spread] = {}
    for name, backend in BACKENDS.items():
        calls = [_attention(q, k, v, mask) for q, k, v in dense]
        try:
            with sdpa_kernel(backend):
                found[name] = time_calls(calls, dense[0][0].device, seconds)
        except RuntimeError:  # not built, not for this shape, or out of memory
            continue
    best = min(found, key=lambda name: found[name].p50, default=None)
    return None if best is None else (best, found[best])


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> Call:
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: device, driver, versions, commit."""
    found: dict[str, Any] = {
        "device": platform.processor() or "cpu",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.mem", "--format=csv,noheader"]
        found["driver"] = _output(query)
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    root = str(Path(__file__).parent)
    found["commit"] = _output(["git", "-C", root, "rev-parse", "HEAD"])
    found["changed"] = bool(_output(["git", "-C", root, "status", "--porcelain", "-uno"]))
    return found


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
