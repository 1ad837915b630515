"""python -m pipelines.evaluation.off_policy --log data/shown --tasks clicked --columns target=p_new

The same as `mmoe-rec off-policy`; --help describes it.
"""

from mmoe_rec.jobs.commands.evaluation.off_policy import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
