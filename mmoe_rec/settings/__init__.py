"""Strict, documented settings: one YAML file per data set plus command-line overrides.

`load.load_settings("configs/x.yaml", ["--model.experts.count", "16"])` gives a frozen `Settings`. Every key is checked;
an unknown or ill-typed key is a `UserError` that names it and the nearest valid key. `load.describe()` is the text of
`--help`.
"""
