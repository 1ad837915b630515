"""python -m pipelines.refresh --config configs/complete_journey.yaml

The same as `mmoe-rec refresh`; --help describes it.
"""

from mmoe_rec.jobs.commands.live.refresh import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
