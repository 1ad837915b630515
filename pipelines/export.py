"""python -m pipelines.export --model models:/shop@champion --out small --int8

The same as `mmoe-rec export`; --help describes it.
"""

from mmoe_rec.jobs.commands.export import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
