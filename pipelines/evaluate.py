"""python -m pipelines.evaluate --config configs/complete_journey.yaml --model models:/complete_journey@champion

The same as `mmoe-rec evaluate`; --help describes it.
"""

from mmoe_rec.jobs.commands.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
