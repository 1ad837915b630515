"""mmoe-rec doctor --config shop.yaml

Check the packages, the devices, MLflow and the work folder, and print a fix for each problem. The exit code is 1 if a
problem exists, else 0. Without --config, check the current folder and MLFLOW_TRACKING_URI.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import click

from mmoe_rec.cli.main import command
from mmoe_rec.errors import UserError
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Tracking

COMPATIBLE_VERSIONS = {
    "2.11": ("1.6.1", "1.6.0"),
    "2.12": ("1.7.0",) * 2,
    "2.13": ("1.8.0",) * 2,
    "2.14": ("1.9.2", "1.9.0"),
}
"""Release of torch -> the versions of torchrec and fbgemm that are built for this release."""
BUILDS = {"fbgemm-gpu-cpu": "cpu", "fbgemm-gpu": "cuda"}
PROBE = "import {}; print(*map(torch.cuda.get_device_name, range(torch.cuda.device_count())), sep=', ')"


class Check(NamedTuple):
    """Line of the report with a fix, which is empty if there is no problem."""

    name: str
    text: str
    fix: str = ""


def check_packages(versions: Mapping[str, str]) -> Check:
    """Check that the versions of torch, torchrec and fbgemm match."""
    builds, release = [name for name in BUILDS if name in versions], versions.get("torch", "none").rpartition(".")[0]
    text = ", ".join(" ".join(item) for item in versions.items())
    if release in COMPATIBLE_VERSIONS and not builds and "torchrec" not in versions:
        return Check("packages", f"{text}; without torchrec and fbgemm: plain PyTorch tables, one process")
    wanted = dict(zip(("torchrec", (builds or [*BUILDS])[0]), COMPATIBLE_VERSIONS.get(release, ()), strict=False))
    wrong = [f"{name}=={version}" for name, version in wanted.items() if versions.get(name) != version]
    wrong += [] if wanted else [f"torch {' or '.join(COMPATIBLE_VERSIONS)}"]
    wrong += ["one build of fbgemm alone"] if len(builds) > 1 else []
    text += f"; needed: {', '.join(wrong)}" if wrong else ""
    fix = "run `uv sync --extra cpu` (or cuda), or the pip command in docs/how-to/install.md" if wrong else ""
    return Check("packages", text, fix)


def check_imports(versions: Mapping[str, str]) -> Iterator[Check]:
    """Import the libraries in a separate process, which may crash, and list the devices."""
    names = ", ".join(["torch", *["fbgemm_gpu, torchrec"] * ("torchrec" in versions), "lightgbm", "mlflow"])
    arguments = [sys.executable, "-c", PROBE.format(names)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        fix = "run `uv sync --extra cpu --reinstall` (or --extra cuda)"
        yield Check("imports", f"importing {names} fails: {error}", fix)
    else:
        yield Check("imports", names)
        cards = done.stdout.splitlines()[-1]
        fix = "run `uv sync --extra cuda` or set --training.device cpu" * bool(cards and "fbgemm-gpu-cpu" in versions)
        yield Check("devices", cards or "no CUDA device: models train on the CPU", fix)


def check_mlflow(uri: str) -> Check:
    """Check that the MLflow store at `uri` responds, without creating a database."""
    from mmoe_rec.tracking.client import open_client, read_sqlite_path

    if (store := read_sqlite_path(uri)) and not store.exists():
        return Check("MLflow", f"{uri} (created by the first run)")
    try:
        with open_client(uri) as client:
            client.search_experiments(max_results=1)
    except UserError as error:
        return Check("MLflow", str(error), "start the server, or set tracking.uri to another URI")
    return Check("MLflow", f"{uri} answers")


def check_folder(work: Path) -> Check:
    """Check that the work folder is writable and that its disk has at least 5 GiB free."""
    parent = next(folder for folder in (work.absolute(), *work.absolute().parents) if folder.exists())
    free, can_write = shutil.disk_usage(parent).free / 2**30, os.access(parent, os.W_OK)
    fix = "" if free >= 5 and can_write else "set data.work_dir to a folder that you can write to, with 5 GiB or more"
    return Check("work folder", f"'{work}', {free:,.0f} GiB free", fix)


@command(__doc__)
@click.option("--config", metavar="C", help="settings file with the work folder and the MLflow URI")
def doctor(config: str | None) -> None:
    settings, versions = None if config is None else load_settings(config), dict[str, str]()
    for name in ("torch", "torchrec", *BUILDS, "mlflow"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    checks = [check_packages(versions), *check_imports(versions)]
    if checks[-1].name == "devices":
        checks.append(check_mlflow((Tracking() if settings is None else settings.tracking).resolved_uri))
    checks.append(check_folder(Path("." if settings is None else settings.data.work_dir)))
    for name, text, fix in checks:
        print(f"{'fix' if fix else 'ok':4} {name:12} {text}")
        if fix:
            print(f"     {fix}")
    raise SystemExit(any(fix for _, _, fix in checks))
