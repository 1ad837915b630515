"""Commands, each run as `python -m pipelines.NAME`. Those for any data set are the package's, also `mmoe-rec NAME`."""

import mmoe_rec.jobs  # noqa: F401 - how threads wait is decided before torch is loaded
