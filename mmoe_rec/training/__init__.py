"""Train: encoded rows go in, a registered model comes out, on one process or many.

Begin in `train`, the whole command. `loop` takes the steps, and `stacking` adds trees.
"""
