"""Training of whole models from text: `pretrain.py` runs it; the other files are its parts.

`architecture.py` builds the model, `tokenizer.py` its tokenizer, `windows.py` says which tokens a
step reads, `dropout.py` regularises, `attention.py` is fast attention for training on a CPU,
`plan.py` says how long and how fast, `loop.py` is the loop, `checkpoint.py` lets a killed run
continue exactly, `heldout.py` measures, `result.py` writes the model folder and `card.py` its card,
from what was measured.
"""
