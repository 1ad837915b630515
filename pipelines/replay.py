"""python -m pipelines.replay --config C --from DAY --to DAY

The same as `mmoe-rec replay`; --help describes it.
"""

from mmoe_rec.jobs.commands.live.replay import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
