"""What the commands do, as functions of settings.

Importing it sets how OpenMP's threads wait for each other, which has to be done before torch is loaded. By default they
spin for milliseconds, which makes training three times slower on a machine that other programs use too. If they sleep
at once, training on an idle machine is a quarter slower. GNU's, which torch comes with, spin for microseconds instead.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
