"""python -m pipelines.evaluation.promote --config configs/complete_journey.yaml --challenger challenger

The same as `mmoe-rec promote`; --help describes it.
"""

from mmoe_rec.jobs.commands.evaluation.promote import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
