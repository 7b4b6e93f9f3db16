"""Training data: sources, rows, packing and streams."""
