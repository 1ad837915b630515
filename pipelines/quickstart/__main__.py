"""python -m pipelines.quickstart"""

from pipelines.quickstart import main

if __name__ == "__main__":
    main()
