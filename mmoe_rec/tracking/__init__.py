"""MLflow runs, metrics, files and registered models.

Begin in `runs` for runs, and in `registry` for models. Only this package and `inference` import MLflow.
"""
