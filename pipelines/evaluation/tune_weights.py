"""python -m pipelines.evaluation.tune_weights --config configs/shop.yaml --model models:/shop@champion --goal bought

The same as `mmoe-rec tune-weights`; --help describes it.
"""

from mmoe_rec.jobs.commands.evaluation.tune_weights import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
