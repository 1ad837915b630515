"""python -m pipelines.score --model models:/complete_journey@champion --input data/complete_journey/log --output scores

The same as `mmoe-rec score`; --help describes it.
"""

from mmoe_rec.jobs.commands.score import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
