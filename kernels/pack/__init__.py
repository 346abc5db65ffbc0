"""Bit packing of codes along the channels of a head."""
