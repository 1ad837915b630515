"""python -m pipelines.inspect --config configs/complete_journey.yaml

The same as `mmoe-rec inspect`; --help describes it.
"""

from mmoe_rec.jobs.commands.inspect import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
