"""What an example is, and in which order examples come: arrays, blocks, sources, splits, batches."""
