"""Attention of a few queries over packed keys and values, without a dense copy of them."""
