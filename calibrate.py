"""Calibrate: `python calibrate.py model=tiny` (see conf/calibrate.yaml)."""

from kvsmith.pipeline.calibrate import CalibrateConfig, run
from kvsmith.pipeline.config import launch

if __name__ == "__main__":
    launch("calibrate", CalibrateConfig, run, processes=True)
