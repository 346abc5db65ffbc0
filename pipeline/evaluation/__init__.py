"""What a compressed cache costs and saves, one metric a file, all through the real cache."""
