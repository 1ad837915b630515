"""Training, from encoded rows to a registered model, in one process or several.

Start with `train`, which contains the whole command. `loop` runs the steps, and `stacking` adds trees.
"""
