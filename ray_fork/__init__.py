"""Worker processes by fork: Ray's workers start in tenths of a second, from a process that has imported everything."""
