"""Build fitted features and encoded rows from a log and a schema.

Start with `prepare`, which builds a folder of features. `extend` adds days to an existing folder.
"""
