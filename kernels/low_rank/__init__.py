"""Low-rank factors of what a codec leaves, per head and block of tokens."""
