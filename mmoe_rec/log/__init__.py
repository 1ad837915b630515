"""A log: where it lies, how it is read and checked, and what its columns hold."""
