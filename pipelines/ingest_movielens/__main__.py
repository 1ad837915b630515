"""python -m pipelines.ingest_movielens: see the package."""

from pipelines.ingest_movielens import main

if __name__ == "__main__":
    main()
