"""Attention mass that each cached token receives."""
