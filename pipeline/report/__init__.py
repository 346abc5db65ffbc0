"""Measurements as tables, sentences and figures."""
