"""Several runs of one job: one per seed, or per fold of a cross-validation."""
