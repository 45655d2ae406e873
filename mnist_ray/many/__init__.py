"""Many runs of one job: the trials of a sweep, and the runs of several seeds or folds."""
