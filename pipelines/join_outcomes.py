"""python -m pipelines.join_outcomes --config C --requests DIR --events DIR --out DIR

The same as `mmoe-rec join-outcomes`; --help describes it.
"""

from mmoe_rec.jobs.commands.live.join_outcomes import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
