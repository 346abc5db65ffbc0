"""Attention of queries over dense keys and values, as a Partial."""
