"""Encoded rows as batches, each rank its share, in a seeded order, resumable at any row."""
