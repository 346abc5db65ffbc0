"""Damaged bundles without end, every one made from a seed and a number.

`corpus.py` holds sound bundles; `damage.py`, `text.py` and `disk.py` damage them; `oracle.py` says
what loading may do; `campaign.py` runs them, `python -m tests.fuzz` for as long as one likes.
"""
