"""Compile every kernel for every target without a GPU, and read what it takes from the binary.

An op's `triton.py` offers `variants() -> list[Variant]`: each kernel with the argument types and
constants that its launcher uses. `compile_variant` compiles one for a target and reads registers,
spills and shared memory: from a cubin with the `cuobjdump` that the triton package carries, from an
hsaco with its metadata. A kernel that spills or needs more shared memory than the device has is an
error that no GPU is needed to see.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
        name: as in the table.
        backend, arch, warp: what triton's GPUTarget takes.
        shared_limit: bytes of shared memory (LDS) that one program may use.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared_limit: int


# A block on CUDA gets the SM's shared memory (164 and 228 KiB) less 1 KiB that the system keeps.
TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * KIB),
    Target("sm_90", "cuda", 90, 32, 227 * KIB),
    Target("sm_100", "cuda", 100, 32, 227 * KIB),
    Target("gfx942", "hip", "gfx942", 64, 64 * KIB),
)


@dataclass(frozen=True)
class Variant:
    """A kernel as a launcher would compile it.

    Attributes:
        op: folder of the op.
        name: what tells it from the op's other variants.
        kernel: the function under `triton.jit`.
        signature: type of every argument that is no constant, e.g. "*fp16", "i32"; ":16" at the end
            says that the pointer or number is a multiple of 16.
        constexprs: value of every constant argument.
        num_warps, num_stages: options of the launch.
        backend: the only one that it is launched on; "" for all.
    """

    op: str
    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    backend: str = ""

    def runs_on(self, target: Target) -> bool:
        """Whether it is launched on devices of this kind."""
        return self.backend in ("", target.backend)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        op, name, target: which kernel, for which device.
        registers: 32-bit registers a thread.
        spills: CUDA: bytes of stack and local memory a thread; gfx942: bytes of scratch plus vector
            registers spilled (scalar registers spill into lanes of vector registers, not memory).
        shared: bytes of shared memory (LDS) a program.
        limit: bytes of it that the device offers.
        loop: CUDA: machine instructions of the first outermost loop; 0 without one.
    """

    op: str
    name: str
    target: str
    registers: int
    spills: int
    shared: int
    limit: int
    loop: int = 0

    @property
    def fault(self) -> str:
        """What is wrong with the kernel; empty where nothing is."""
        if self.spills:
            return "spills"
        return "shared memory" if self.shared > self.limit else ""


def all_variants() -> list[Variant]:
    """Variants of every op that has a Triton kernel."""
    folders = sorted(p.parent.name for p in Path(__file__).parent.glob("*/triton.py"))
    modules = [importlib.import_module(f"kvsmith.kernels.{name}.triton") for name in folders]
    return [v for m in modules if hasattr(m, "variants") for v in m.variants()]


def cover(variants: Sequence[Variant]) -> list[tuple[Variant, Target]]:
    """A few pairs: each kernel's first variant for every target, one in five of the others for one
    target, in turn.
    """
    firsts: dict[Any, Variant] = {}
    pairs = []
    for i, variant in enumerate(variants):
        targets = [t for t in TARGETS if variant.runs_on(t)]
        if firsts.setdefault((variant.kernel, variant.backend), variant) is variant:
            pairs += [(variant, target) for target in targets]
        elif i % 5 == 0:
            pairs.append((variant, targets[i // 5 % len(targets)]))
    return pairs


def compile_all(pairs: Sequence[tuple[Variant, Target]]) -> Iterator[Resources]:
    """Compile in a cache that is thrown away, so that a stale binary cannot pass."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        for variant, target in pairs:
            yield compile_variant(variant, target)


def compile_variant(variant: Variant, target: Target) -> Resources:
    """Compile one kernel for one target and read what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    types = {name: kind.removesuffix(":16") for name, kind in variant.signature.items()}
    types |= dict.fromkeys(variant.constexprs, "constexpr")
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in variant.signature.items()
        if kind.endswith(":16")
    }
    source = ASTSource(
        variant.kernel, {n: types[n] for n in names}, dict(variant.constexprs), attributes
    )
    binary = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    read = _read_cubin if target.backend == "cuda" else _read_amdgcn
    registers, spills, static, loop = read(binary.asm)
    shared, limit = max(static, binary.metadata.shared), target.shared_limit
    return Resources(variant.op, variant.name, target.name, registers, spills, shared, limit, loop)


def _read_cubin(asm: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(registers, bytes of stack and local memory, static shared bytes, `Resources.loop`)."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text, code = (
            subprocess.run(
                [knobs.nvidia.cuobjdump.path, flag, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    used = {
        name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)
    }
    return used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"], _first_loop(code)


def _first_loop(code: str) -> int:
    """Instructions between the target of a backward branch and the branch, of the outermost loop
    that begins first.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?) *;", code)
    places = [int(place, 16) for place, _ in lines]
    loops = []
    for place, (_, text) in zip(places, lines, strict=True):
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)$", text)
        if target and int(target[1], 16) < place:
            loops.append((int(target[1], 16), place))
    if not loops:
        return 0
    first = min(loops, key=lambda loop: (loop[0], -loop[1]))
    return sum(first[0] <= place <= first[1] for place in places)


def _read_amdgcn(asm: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(vector registers, scratch bytes and spilled vector registers, static LDS bytes, 0)."""
    used = {
        name: int(value)
        for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", asm["amdgcn"], re.MULTILINE)
    }
    spills = used["private_segment_fixed_size"] + used["vgpr_spill_count"]
    return used["vgpr_count"], spills, used["group_segment_fixed_size"], 0


def table(rows: Sequence[Resources]) -> str:
    """The rows as text, faults last in their line."""
    head = ("op", "variant", "target", "registers", "spills", "shared", "limit", "loop", "")
    lines = [head] + [
        (
            r.op,
            r.name,
            r.target,
            str(r.registers),
            str(r.spills),
            str(r.shared),
            str(r.limit),
            str(r.loop),
            r.fault,
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 3 or i == 8 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
