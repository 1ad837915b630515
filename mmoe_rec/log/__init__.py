"""Interaction logs: read Parquet files as checked rows in canonical types.

Start with `reader`, which reads the files in batches. `files` finds the files, and `rows` stores a batch.
"""
