"""Module that the fork server imports, so that forked workers share the memory of all packages."""

import gc

import torch

from mmoe_rec.server import app, connections
from mmoe_rec.server.workers import ignore_stop_signals

__all__ = ["app", "connections"]

ignore_stop_signals()
torch.set_num_threads(1)  # A fork copies only one thread, so workers would lack torch's other OpenMP threads.
gc.collect()
gc.freeze()  # A worker's garbage collection would otherwise write to the shared pages and so copy them.
