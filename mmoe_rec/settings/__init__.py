"""Settings: a YAML file and overrides go in, checked settings come out.

Begin in `load` for reading, and in `sections` for the keys.
"""
