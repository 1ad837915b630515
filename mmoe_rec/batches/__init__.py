"""Read Parquet files of encoded rows as batches of tensors, in a seeded order from which a run can resume.

Each rank reads its part of a batch. Start with `encoded_dataset` for the rows of a split and `batch` for the tensors.
"""
