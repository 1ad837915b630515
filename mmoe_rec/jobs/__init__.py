"""What the commands do, as functions of settings.

It decides how OpenMP's threads wait for each other, which has to be set before torch is loaded. Left alone they spin
for milliseconds, which on a machine that other programs use too makes training three times slower. Asleep at once, they
cost a quarter of the speed of training on an idle one. GNU's, which torch comes with, spin for microseconds instead.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
