"""python -m pipelines.serve --model models:/complete_journey@champion

The same as `mmoe-rec serve`; --help describes it.
"""

from mmoe_rec.jobs.commands.serve import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
