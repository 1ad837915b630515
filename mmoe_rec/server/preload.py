"""Imports of the process from which workers are forked, so that they share the memory of all packages."""

import gc

import torch

from mmoe_rec.server import app, connections
from mmoe_rec.server.workers import ignore_stop_signals

__all__ = ["app", "connections"]

ignore_stop_signals()
torch.set_num_threads(1)  # threads of OpenMP would not be there after a fork
gc.collect()
gc.freeze()  # collecting garbage in a worker would write to the pages of all this, and so copy them
