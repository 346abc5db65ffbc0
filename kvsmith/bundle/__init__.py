"""The bundle: a small folder of JSON and safetensors that makes one model's KV cache small.

`bundle.py` is the class; `manifest.py` and `base_model.py` read manifest.json through
`strict_json.py`, `tensors.py` checks the parameters and `delta.py` the weights that `shards.py`
reads, `folder.py` touches the disk, `hub.py` the network, `card.py` writes README.md. The format
itself is docs/FORMAT.md.
"""

from kvsmith.bundle.base_model import BaseModel, base_model
from kvsmith.bundle.bundle import Bundle, load
from kvsmith.bundle.delta import Delta
from kvsmith.bundle.errors import BundleError
from kvsmith.bundle.manifest import Calibration, Manifest
from kvsmith.bundle.tensors import expected_tensors

__all__ = [
    "BaseModel",
    "Bundle",
    "BundleError",
    "Calibration",
    "Delta",
    "Manifest",
    "base_model",
    "expected_tensors",
    "load",
]
