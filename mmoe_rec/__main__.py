"""Run `python -m mmoe_rec COMMAND`, the same as `mmoe-rec COMMAND`. Needed by `torchrun -m`."""

from mmoe_rec.cli.main import main

if __name__ == "__main__":
    main()
