"""Parameters of codecs, as pure functions of statistics.

`thresholds.py` turns extremes into ranges of channels, `kmeans.py` solves weighted k-means on a
line, `points.py` turns histograms into its input, `q_norm.py` corrects a codebook, and `codec.py`
puts them together: `fit_codec`.
"""

from kvsmith.pipeline.fit.codec import fit_codec
from kvsmith.pipeline.fit.kmeans import fit_codebook, objective
from kvsmith.pipeline.fit.points import Sensitivity, histogram_for

__all__ = ["Sensitivity", "fit_codebook", "fit_codec", "histogram_for", "objective"]
