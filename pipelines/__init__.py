"""Commands, each run as `python -m pipelines.NAME`."""

import os

# OpenMP's threads spin while they wait for each other. On a machine that other programs use too, that made training
# five times slower; sleeping instead costs little on an idle one. It must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
