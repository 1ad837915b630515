"""python -m pipelines.evaluation.metrics --predictions scores --config configs/complete_journey.yaml

The same as `mmoe-rec metrics`; --help describes it.
"""

from mmoe_rec.jobs.commands.evaluation.metrics import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
