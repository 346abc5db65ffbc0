"""Streaming, mergeable statistics of keys and values; none of them sees a model.

A statistic takes tokens as they come (`update`), joins another of its kind (`merge`), and is a
flat dictionary of tensors (`state_dict`, `load_state_dict`). What does not depend on rounding
(counts, extremes) is the same for any order of tokens and any split into parts; sums of Fisher
information agree to float32 rounding.

`extremes.py` gives exact percentiles of channels, `channel_histogram.py` and `token_histogram.py`
what codebooks are fitted to. `plan.py` says which of them a codec needs, `layer.py` keeps those of
one layer.
"""

from kvsmith.pipeline.statistics.base import Statistic
from kvsmith.pipeline.statistics.channel_histogram import ChannelHistogram
from kvsmith.pipeline.statistics.extremes import ChannelExtremes
from kvsmith.pipeline.statistics.layer import LayerStatistics
from kvsmith.pipeline.statistics.plan import Plan, TensorPlan, TokenView, plan_for
from kvsmith.pipeline.statistics.token_histogram import TokenHistogram

__all__ = [
    "ChannelExtremes",
    "ChannelHistogram",
    "LayerStatistics",
    "Plan",
    "Statistic",
    "TensorPlan",
    "TokenHistogram",
    "TokenView",
    "plan_for",
]
