"""Features: columns of a log go in; ids and numbers that the model reads come out.

Begin in `pipeline`, which holds all features of a schema. `kinds/` has a file for each kind of feature.
"""
