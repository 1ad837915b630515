"""python -m pipelines.ingest_complete_journey: see the package."""

from pipelines.ingest_complete_journey import main

if __name__ == "__main__":
    main()
