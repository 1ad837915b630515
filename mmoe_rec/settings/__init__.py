"""Strict, documented settings: one YAML file per data set plus command-line overrides, see `load.load_settings`."""
