"""Interaction logs: addresses of Parquet files go in, checked rows in canonical types come out.

Begin in `reader`, which reads the files in batches. `files` finds them, and `rows` holds a batch.
"""
