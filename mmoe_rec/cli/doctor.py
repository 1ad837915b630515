"""mmoe-rec doctor

Checks this machine and its packages, and says what to type where something is wrong. `--json` prints the same as JSON.
The exit code is 0 when everything works, 1 when something has to be fixed; a warning does not change it.

The embedding libraries are imported in a process of their own, so that a library that crashes while it loads is
reported like any other problem. Nothing is installed or changed.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from mmoe_rec.cli.command import command
from mmoe_rec.devices import usable_cores
from mmoe_rec.jobs.machine import (
    DRIVER,
    SYSTEM_LIBRARIES,
    TORCHREC_NEEDS,
    Check,
    Installer,
    Probe,
    check_choices,
    check_cpu,
    check_cuda,
    check_disk,
    check_fbgemm_build,
    check_memory,
    check_packages,
    check_platform,
    check_python,
    check_system_files,
    check_tables,
    check_trio,
    check_uvicorn,
    has_fbgemm,
)

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"  # in the repository; an installed package has none
PROBE_SECONDS = 300
_EXTRAS = ("tables-cpu", "tables-cuda", "serve", "tune")  # what the extras cpu and cuda consist of


def requirements() -> dict[str, str]:
    """Package name to requirement: the dependencies, both builds of fbgemm, and what torchrec needs besides fbgemm."""
    if PYPROJECT.is_file():
        import tomllib

        project = tomllib.loads(PYPROJECT.read_text())["project"]
        extras = project["optional-dependencies"]
        lines = [*project["dependencies"], *(line for name in _EXTRAS for line in extras[name])]
    else:
        lines = []
        for line in metadata.requires("mmoe-rec") or []:
            requirement, _, marker = line.partition(";")
            if not marker or any(re.search(rf"extra == ['\"]{name}['\"]", marker) for name in _EXTRAS):
                lines.append(requirement.strip())
    found = [(re.match(r"[\w.-]+", line), line) for line in (*lines, *TORCHREC_NEEDS)]
    return {name[0]: line for name, line in found if name}


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed, read without importing them."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def installed_script(package: str) -> str | None:
    """Path of the command that an installed package of the same name brings."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == package and file.parent.name == "bin"]
    return next((str(path.resolve()) for path in paths if path.exists()), None)


def made_by_uv(prefix: Path) -> bool:
    """Whether uv made the environment in this folder; outside any environment, whether uv is installed."""
    settings = prefix / "pyvenv.cfg"
    if settings.is_file():
        return any(line.startswith("uv =") for line in settings.read_text().splitlines())
    return shutil.which("uv") is not None


def probe() -> None:
    """Prints one JSON line of `Probe` fields at the start of each stage, so that the last tells where a crash came."""
    facts: dict[str, Any] = {}

    def report(**found: object) -> None:
        facts.update(found)
        print(json.dumps(facts), flush=True)

    try:
        report(stage="import torch")
        import torch

        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        report(
            torch_cuda=torch.version.cuda,
            cards=[(card.name, card.total_memory) for card in cards],
            stage="import fbgemm_gpu",
        )
        if not any(map(find_spec, ("fbgemm_gpu", "torchrec"))):
            report(stage="look up an embedding")
            _expect_sums(_plain_sums())
            report(choices=_choices(), stage="done")
            return
        import fbgemm_gpu  # noqa: F401

        report(stage="import torchrec")
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

        report(stage="look up an embedding")
        table = EmbeddingBagConfig(name="table", embedding_dim=4, num_embeddings=3, feature_names=["feature"])
        tables = EmbeddingBagCollection(tables=[table])
        torch.nn.init.ones_(tables.embedding_bags["table"].weight)
        ids = KeyedJaggedTensor.from_lengths_sync(["feature"], torch.tensor([0, 2, 1]), torch.tensor([2, 1]))
        _expect_sums(tables(ids)["feature"])
        report(stage="train a model for a few steps")
        report(choices=_choices(), stage="done")
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        report(error=f"{type(error).__name__}: {lines[-1]}")


def _choices() -> dict[str, str]:
    """Device -> what a training of common size would compute in there."""
    import torch

    from mmoe_rec.training.measure import sample_choices

    devices = [torch.device(kind) for kind in ("cpu", *["cuda"] * torch.cuda.is_available())]
    return {device.type: str(sample_choices(device)) for device in devices}


def _plain_sums() -> Any:
    import torch

    from mmoe_rec.training.tables import Place, RowWise, Storage

    storage = Storage(torch.ones(12), torch.zeros(3), torch.zeros(()), 1.0)
    ids, offsets = torch.tensor([0, 2, 1]), torch.tensor([0, 2, 3])
    return RowWise([Place("table", 3, 4, 0, 0)]).look_up(storage, ids, offsets, torch.zeros(0))


def _expect_sums(pooled: Any) -> None:
    if pooled.tolist() != [[2.0] * 4, [1.0] * 4]:
        raise ArithmeticError(f"expected sums of 2 and 1, found {pooled.tolist()}")


def run_probe() -> Probe:
    """Runs `probe` in a process of its own."""
    words = [sys.executable, "-W", "ignore", "-c", "from mmoe_rec.cli.doctor import probe; probe()"]
    started = time.perf_counter()
    crash = None
    try:
        done = subprocess.run(
            words, cwd=PYPROJECT.parent, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
        output, errors = done.stdout, done.stderr
        if done.returncode < 0:
            crash = f"died of {signal.Signals(-done.returncode).name}"
        elif done.returncode:
            crash = (errors.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        crash = f"no answer after {PROBE_SECONDS} seconds"
    lines = [line for line in output.splitlines() if line.startswith('{"stage"')]
    facts = json.loads(lines[-1]) if lines else {}
    if crash and facts.get("stage") != "done":
        facts["error"] = crash
    return Probe(**facts, seconds=time.perf_counter() - started)


def run_checks() -> list[Check]:
    """All checks of this machine; only the first few where nothing else could work."""
    version = sys.version_info
    checks = [
        check_python((version.major, version.minor, version.micro)),
        check_platform(platform.system(), platform.machine()),
    ]
    if any(check.status == "fail" for check in checks):
        return checks
    has_driver = _loads(DRIVER)
    required = requirements()
    linux = platform.system() == "Linux"
    with_cuda = has_driver and platform.machine() == "x86_64"  # fbgemm's CUDA build has no other wheel
    versions = installed_versions(required)
    installer = Installer(made_by_uv(Path(sys.prefix)), "cuda" if with_cuda else "cpu", required)
    installer = installer.beside(versions.get("torch"))
    if find_spec("packaging") is None or find_spec("rich") is None:
        found = f"{sys.executable} lacks the project's packages"
        again = f"uv run --extra {installer.build} mmoe-rec doctor"
        return [*checks, Check("packages", "fail", found, again if installer.uv else installer.install_all())]

    probed = run_probe()
    return [
        *checks,
        check_system_files((name for name in SYSTEM_LIBRARIES if linux and not _loads(name)), _has_time_zones()),
        check_trio(versions, installer, has_fbgemm(platform.system(), platform.machine())),
        check_fbgemm_build(versions, has_driver, len(probed.cards), installer),
        check_tables(probed, installer),
        *check_packages(versions, installer),
        check_uvicorn(shutil.which("uvicorn"), installed_script("uvicorn"), installer),
        check_cpu(usable_cores(), os.environ.get("OMP_NUM_THREADS")),
        check_cuda(probed, has_driver),
        check_choices(probed),
        *([check_memory(*_memory())] if linux else []),
        check_disk(shutil.disk_usage(Path.cwd()).free, str(Path.cwd())),
    ]


def show(checks: Sequence[Check]) -> None:
    """Prints the table, then each problem with what to type, on lines that are not broken, for copying."""
    if find_spec("rich") is None:
        for check in checks:
            print(f"{check.status:4}  {check.name}: {check.found}")
    else:
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text

        table = Table("", "check", Column("found", overflow="fold"), box=None, pad_edge=False)
        for check in checks:
            style = {"ok": "green", "warn": "yellow", "fail": "red"}[check.status]
            table.add_row(Text(check.status, style), check.name, Text(check.found))
        Console().print(table)
    wrong = [check for check in checks if check.status != "ok"]
    for fix in dict.fromkeys(check.fix for check in wrong):
        names = ", ".join(check.name for check in wrong if check.fix == fix)
        print(f"\n{names}: what to type or do\n    {fix}")
    failed = sum(check.status == "fail" for check in checks)
    print(f"\n{failed} to fix, {len(wrong) - failed} to know." if wrong else "\nAll is well.")


@command(__doc__)
@click.option("--json", "as_json", is_flag=True, help="print JSON: `ok` and a list of `checks`")
def doctor(as_json: bool) -> None:
    """Runs the command."""
    with nullcontext() if as_json else _spinner():
        checks = run_checks()
    failed = any(check.status == "fail" for check in checks)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        show(checks)
    raise SystemExit(1 if failed else 0)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _has_time_zones() -> bool:
    """Whether pandas finds a time zone, in the system's files or in the tzdata package."""
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    try:
        ZoneInfo("America/New_York")
    except ZoneInfoNotFoundError:
        return False
    return True


def _memory() -> tuple[int, int]:
    """Total and available bytes, within the limit of a container."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines}
    total, available = 1024 * kilobytes["MemTotal"], 1024 * kilobytes["MemAvailable"]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
        available = min(available, max(0, int(text) - int(used.read_text())))
    return total, available


def _spinner() -> Any:
    if find_spec("rich") is None:
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status("importing torch, fbgemm and torchrec")
