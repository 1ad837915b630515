"""New MLflow stores as copies of one: MLflow makes one by all migrations that there ever were, which takes a second."""

import os
import shutil
from pathlib import Path
from typing import Any


def copy_new_stores() -> None:
    """From now on MLflow makes a new SQLite store by copying the first one, here and in processes forked from this."""
    from mlflow.store.db import utils
    from mlflow.store.model_registry import sqlalchemy_store as registry

    make = utils._initialize_tables
    if make.__module__ == __name__:
        return
    template = Path(os.environ["MMOE_REC_TESTS"]) / "store.db"

    def initialize_tables(engine: Any) -> None:
        file = engine.url.database
        if engine.url.get_backend_name() != "sqlite" or not file or not utils._is_empty_database(engine):
            make(engine)
        elif template.exists():
            engine.dispose()
            shutil.copyfile(template, file)
        else:
            make(engine)
            copy = template.with_suffix(f".{os.getpid()}")
            shutil.copyfile(file, copy)
            copy.rename(template)

    utils._initialize_tables = registry._initialize_tables = initialize_tables
