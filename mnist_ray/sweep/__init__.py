"""Many runs: a search over hyperparameters."""
