"""Commands, each run as `python -m pipelines.NAME`. Those for any data set are the package's, also `mmoe-rec NAME`."""

import mmoe_rec  # noqa: F401 - The way that threads wait is set before torch is loaded.
