"""Build features: a log and a schema go in; fitted features and encoded rows come out.

Begin in `prepare`, which builds a folder of features. `extend` adds days to one.
"""
