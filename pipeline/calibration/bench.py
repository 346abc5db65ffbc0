"""`python -m kvsmith.pipeline.calibration.bench`: host memory of calibration above the model.

A Llama with random weights of the real widths and few layers runs the whole pass on a CPU. Peaks
are resident memory (VmHWM, set back when the model stands), without what the model takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvsmith.pipeline.calibrate import CalibrateConfig, calibrate
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.data import PydocsData
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import DTYPES, ModelConfig
from kvsmith.pipeline.progress import reset_peak, resident
from kvsmith.pipeline.stage import Stop

CODECS = ("nuq4_o1", "nuq3_o1", "nuq2_o1")
SHAPES: dict[str, dict[str, int]] = {
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def random_model(shape: str, layers: int, dtype: torch.dtype) -> Any:
    """A model of the real width; its weights are random and small enough to stay finite."""
    config = LlamaConfig(
        **SHAPES[shape], num_hidden_layers=layers, vocab_size=32000, max_position_embeddings=4096
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def measure(shape: str, layers: int, length: int, samples: int, dtype: str, log: Run) -> list[str]:
    """One row: layers, tokens, model and peak above it in MiB, seconds a sequence."""
    model = random_model(shape, layers, DTYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32000, (samples, length), generator=generator)
    cfg = CalibrateConfig(
        model=ModelConfig("random/llama", dtype=dtype, device="cpu"),  # type: ignore[arg-type]
        data=PydocsData(),
        codecs=CODECS,
        samples=samples,
        length=length,
        batch_size=1,
    )
    codecs = {name: load_codec(name) for name in CODECS}
    with tempfile.TemporaryDirectory() as folder, Stop() as stop:
        cfg = replace(cfg, folder=folder)
        before = resident()
        reset_peak()
        began = time.monotonic()
        calibrate(cfg, codecs, model, tokens, log, stop)
        seconds = time.monotonic() - began
        disk = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        above = resident(peak=True) - before
    numbers = (before, above, disk)
    row = [str(layers), str(samples), str(length), *(f"{n / 2**20:,.0f}" for n in numbers)]
    return [*row, f"{seconds / samples:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args()
    with Run(None) as log:
        rows = [
            measure(options.shape, layers, options.length, options.samples, options.dtype, log)
            for layers in options.layers
        ]
        columns = ("layers", "samples", "length", "model MiB", "above it MiB", "disk MiB", "s each")
        log.table(f"{options.shape}, {options.dtype}, batch 1, on the host", columns, rows)


if __name__ == "__main__":
    main()
