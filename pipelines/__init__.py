"""Commands for the public data sets, run as `python -m pipelines.NAME`. Other commands are run as `mmoe-rec NAME`."""

import mmoe_rec  # noqa: F401 - This import sets how threads wait, before torch is loaded.
