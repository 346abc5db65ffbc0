"""LESS: a small trained state remembers what eviction forgets (arXiv:2402.09398).

`spec.py` says what it is and which tensors it owns, `features.py` maps queries and keys to
features, `state.py` folds evicted tokens and answers queries.
"""
