"""What other programs wrote, read without running any of it.

`pickles.py` is a reader of pickles that knows numbers, containers, tensors and arrays and calls
nothing; `kvquant.py` turns KVQuant's quantizers into parameters of a codec, `rotations.py` the
rotation files of OSCAR and its like.
"""
