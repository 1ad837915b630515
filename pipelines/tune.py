"""python -m pipelines.tune --config configs/complete_journey.yaml --trials 20

The same as `mmoe-rec tune`; --help describes it.
"""

from mmoe_rec.jobs.commands.tune import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
