"""Quantize a block of tokens, pick its outliers and pack it, in one operation."""
