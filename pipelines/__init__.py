"""Commands, each run as `python -m pipelines.NAME`."""

import os

# How OpenMP's threads wait for each other, set before torch is loaded. Left alone they spin for milliseconds, which on
# a machine that other programs use too makes training three times slower. Asleep at once, they cost a quarter of the
# speed of training on an idle one. GNU's, which torch comes with, spin for microseconds instead.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
