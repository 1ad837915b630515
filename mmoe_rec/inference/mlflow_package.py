"""How an artifact folder becomes an MLflow model: code, requirements, example and signature."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmoe_rec.inference.artifact import read_artifact

# The packages whose installed versions the served model asks for; scoring needs neither torchrec nor fbgemm. tzdata is
# for images and systems without time zones of their own.
SERVED_PACKAGES = ("mlflow", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "torch", "tzdata")
# The parts of this package that scoring imports.
SERVED_CODE = (
    "__init__.py",
    "errors.py",
    "settings",
    "atomic.py",
    "devices.py",
    "log",
    "point_in_time",
    "features",
    "batches",
    "model",
    "inference",
)


def arguments(artifact_folder: Path, scratch: Path) -> dict[str, Any]:
    """Arguments of `mlflow.pyfunc.log_model`. scratch: an empty folder that lives until the model is logged."""
    code = _served_code(scratch / "mmoe_rec")
    example = json.loads((artifact_folder / "example_request.json").read_text(encoding="utf-8"))
    return {
        "python_model": str(code / "inference" / "mlflow_model.py"),
        "artifacts": {"model": str(artifact_folder)},
        "code_paths": [str(code)],
        "pip_requirements": [f"{package}=={version(package).split('+')[0]}" for package in SERVED_PACKAGES],
        "input_example": ([example], {"task_weights": {"engagement": 1.0, "satisfaction": 1.0}, "top_k": 5}),
        # MLflow takes a uv.lock and pyproject.toml of the working folder for the model's, and then builds that project
        # instead of installing the requirements. It is told to look for them where none are.
        "uv_project_path": str(scratch),
    }


def _served_code(target: Path) -> Path:
    package = Path(__file__).parents[1]
    target.mkdir(parents=True)
    for name in SERVED_CODE:
        source = package / name
        (target / name).parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target


def with_params(signature: Any, artifact_folder: Path) -> Any:
    """The signature with the optional parameters of `mmoe_rec.inference.request.OPTIONS`.

    MLflow derives parameters from the example: its values become everyone's defaults, and every weight in it required.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, DataType, Object, ParamSchema, ParamSpec, Property

    tasks = read_artifact(artifact_folder, verify=False).tasks
    names = dict.fromkeys([*(task.name for task in tasks), *(task.objective for task in tasks)])
    # The model checks the weights itself: its errors are one sentence, MLflow's repeat the schema.
    weights = Object([Property(name, AnyType(), required=False) for name in names])
    params = ParamSchema(
        [
            ParamSpec("task_weights", weights, {}),
            ParamSpec("top_k", DataType.long, None),
            ParamSpec("gate_top_k", DataType.long, None),
            ParamSpec("mask_experts", DataType.long, [], shape=(-1,)),
            ParamSpec("explain", DataType.boolean, None),
        ]
    )
    changed = ModelSignature(signature.inputs, signature.outputs, params)
    changed._is_signature_from_type_hint = True  # else the server would parse requests as data frames
    return changed
