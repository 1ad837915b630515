"""MLflow: metrics, files and models go in; runs and registered versions come out.

Begin in `runs` for runs, and in `registry` for models. Together with `inference`, this room alone imports MLflow.
"""
