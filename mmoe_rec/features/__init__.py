"""Convert columns of a log into the ids and numbers that a model reads.

Start with `pipeline`, which has all features of a schema. `kinds/` has one file for each kind of feature.
"""
