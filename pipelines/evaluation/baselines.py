"""python -m pipelines.evaluation.baselines --config configs/shop.yaml --model models:/shop@champion

The same as `mmoe-rec baselines`; --help describes it.
"""

from mmoe_rec.jobs.commands.evaluation.baselines import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
