"""One number in, the best cache out: which codec each layer's keys and values get under a budget.

`choices.py` lists what a side of a layer may be and what it costs, `sensitivity.py` measures what
each choice alone does to the model's predictions, `solve.py` picks, `make.py` is the way from a
calibration to a bundle, and `memory.py` the same without files, for `kvsmith.fit`.
"""

from kvsmith.pipeline.budget.choices import Levels, assemble, levels
from kvsmith.pipeline.budget.options import BudgetOptions
from kvsmith.pipeline.budget.solve import Solution, solve

__all__ = ["BudgetOptions", "Levels", "Solution", "assemble", "levels", "solve"]
