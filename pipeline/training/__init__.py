"""Training of whole models from text: `pretrain.py` runs it; the other files are its parts.

`architecture.py` builds the model, `tokenizer.py` its tokenizer, `windows.py` says which tokens a step reads, `dropout.py`
regularises, `attention.py` is fast attention for training on a CPU, `loop.py` is the loop, `checkpoint.py` lets a killed
run continue exactly, `heldout.py` measures, `card.py` writes the model card from what was measured.
"""
