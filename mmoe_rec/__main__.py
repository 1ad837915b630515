"""python -m mmoe_rec COMMAND ..., the same as mmoe-rec COMMAND, for torchrun and the like."""

from mmoe_rec.cli.main import main

if __name__ == "__main__":
    main()
