"""MLflow runs, metrics, files and registered models.

`runs` records runs, and `registry` manages models. Only this package and `inference` import MLflow.
"""
