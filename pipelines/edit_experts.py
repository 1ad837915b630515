"""python -m pipelines.edit_experts --config configs/shop.yaml --model models:/shop@champion --add 2

The same as `mmoe-rec edit-experts`; --help describes it.
"""

from mmoe_rec.jobs.commands.edit_experts import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
