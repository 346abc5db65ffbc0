"""The seam to transformers: all that the runtime knows of it stands in this folder.

`geometry` reads a model's shape, `masks` and `seam` hook into its attention, `cache` is what
`generate(past_key_values=...)` takes, `dense` and `answer` serve families without the attention
interface, `observe` lets calibration watch, `share` lets layers share. Public interfaces only; no
model file is patched.
"""

from kvsmith.hf.cache import KVCache, make_cache
from kvsmith.hf.geometry import geometry
from kvsmith.hf.observe import observe_kv
from kvsmith.hf.seam import attach
from kvsmith.hf.share import share

__all__ = ["KVCache", "attach", "geometry", "make_cache", "observe_kv", "share"]
