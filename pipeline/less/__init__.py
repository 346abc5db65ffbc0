"""Training of LESS states: `train.py less=...`.

`options.py` says what is trained, `record.py` streams the activations of the full model and replays
the eviction on them with the runtime's own store, `parallel.py` is the state as a function of its
features for all positions at once, `layers.py` trains one layer, `training.py` all of them, spread
over `workers.py`, `joint.py` goes on with all at once, `allot.py` divides ranks among layers,
`run.py` puts it together, `result.py` keeps it for `export.py`. `study.py` compares states over
seeds, `bench.py` times them in decoding, `oracle.py` compares H2O's scores with the published
code's.
"""
