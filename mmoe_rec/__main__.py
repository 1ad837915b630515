"""Entry point of `python -m mmoe_rec COMMAND`, which does the same as `mmoe-rec COMMAND`. `torchrun -m` needs it."""

from mmoe_rec.cli.main import main

if __name__ == "__main__":
    main()
