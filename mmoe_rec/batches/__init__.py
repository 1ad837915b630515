"""Encoded rows as batches, each rank its share, in a seeded order, to be gone on with at any place."""
