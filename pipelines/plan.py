"""python -m pipelines.plan --config configs/cluster.yaml --world-size 16 --local-world-size 8 --hbm-gib 80

The same as `mmoe-rec plan`; --help describes it.
"""

from mmoe_rec.jobs.commands.plan import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
