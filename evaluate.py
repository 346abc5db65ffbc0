"""Measure bundles beside full precision and baselines: python evaluate.py model=tiny bundle=DIR"""

from kvsmith.pipeline.config import launch
from kvsmith.pipeline.evaluate import EvaluateConfig, run

if __name__ == "__main__":
    launch("evaluate", EvaluateConfig, run)
