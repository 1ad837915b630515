"""Strict, documented settings: one YAML file per data set plus command-line overrides.

`load_settings("configs/x.yaml", ["--model.experts.count", "16"])` gives a frozen `Settings`. Every key is checked; an
unknown or ill-typed key is a `UserError` that names it and the nearest valid key. `describe()` is the text of `--help`.
"""

from mmoe_rec.settings.help import describe
from mmoe_rec.settings.load import load_settings, parse_overrides
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.sections import Settings, Tracking, Training
from mmoe_rec.settings.split import Split
from mmoe_rec.settings.tuning import Search

__all__ = [
    "Model",
    "Search",
    "Settings",
    "Split",
    "Tracking",
    "Training",
    "describe",
    "load_settings",
    "parse_overrides",
]
