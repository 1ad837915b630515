"""Imports of the process from which workers are forked, so that they share the memory of all packages."""

import gc
import signal

import torch

from mmoe_rec.errors import STOP_SIGNALS
from mmoe_rec.inference import ranker
from mmoe_rec.server import app, running

__all__ = ["app", "ranker", "running"]

for each in STOP_SIGNALS:  # Any may reach all processes of a service. The parent passes it on.
    signal.signal(each, signal.SIG_IGN)
torch.set_num_threads(1)  # threads of OpenMP would not be there after a fork
gc.collect()
gc.freeze()  # collecting garbage in a worker would write to the pages of all this, and so copy them
