"""python -m pipelines.doctor

The same as `mmoe-rec doctor`; --help describes it.
"""

from mmoe_rec.jobs.commands.doctor import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
