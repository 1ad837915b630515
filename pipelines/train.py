"""python -m pipelines.train --config configs/complete_journey.yaml

The same as `mmoe-rec train`; --help describes it.
"""

from mmoe_rec.jobs.commands.train import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
