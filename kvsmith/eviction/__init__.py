"""Which tokens stay: `policy.py` decides, `store.py` holds them and frees the rest, `attention.py`
reads them and tells the policy what each one was worth.
"""
