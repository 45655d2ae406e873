"""A job before its training: settings, data, the dry run, the connection, and its place in the storage."""
