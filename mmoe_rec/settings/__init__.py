"""Settings of a data set: a YAML file with overrides, checked key by key.

Read `load` first for reading a file, and `sections` for the keys.
"""
