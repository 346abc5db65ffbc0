"""Export a bundle: `python export.py model=tiny codec=kvquant_nuq4_o1` (see conf/export.yaml)."""

from kvsmith.pipeline.config import launch
from kvsmith.pipeline.export import ExportConfig, run

if __name__ == "__main__":
    launch("export", ExportConfig, run)
