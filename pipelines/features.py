"""python -m pipelines.features --config configs/complete_journey.yaml

The same as `mmoe-rec features`; --help describes it.
"""

from mmoe_rec.jobs.commands.features import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
