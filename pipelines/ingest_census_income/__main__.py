"""python -m pipelines.ingest_census_income: see the package."""

from pipelines.ingest_census_income import main

if __name__ == "__main__":
    main()
