"""Modules of the ingest commands: shared functions, and readers or generators of single data sets."""
