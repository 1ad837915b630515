"""Encoded rows as batches: Parquet files of encoded rows go in, tensors come out, in a seeded order and resumable.

Each rank gets its share. Begin in `encoded_rows` for the rows of a split, and in `batch` for the tensors.
"""
