"""Decode packed tokens to dense keys or values."""
