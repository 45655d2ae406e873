"""Examples and the order in which they come: arrays, blocks, sources, splits, batches."""
