"""Plan: `python plan.py model=llama3-8b device=h200 context=1M` (see conf/plan.yaml)."""

from kvsmith.pipeline.config import launch
from kvsmith.pipeline.plan import PlanConfig, run

if __name__ == "__main__":
    launch("plan", PlanConfig, run)
