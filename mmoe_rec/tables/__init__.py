"""Embedding tables in training: where they lie, over one rank or many, and how they are looked up and updated."""
