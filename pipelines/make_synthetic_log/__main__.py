"""python -m pipelines.make_synthetic_log: see the package."""

from pipelines.make_synthetic_log import main

if __name__ == "__main__":
    main()
