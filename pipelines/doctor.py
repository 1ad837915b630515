"""python -m pipelines.doctor

Checks this machine and its packages, and says what to type where something is wrong. `--json` prints the same as JSON.
The exit code is 0 when everything works, 1 when something has to be fixed; a warning does not change it.

The embedding libraries are imported in a process of their own, so that a library that crashes while it loads is
reported like any other problem. Nothing is installed or changed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
BUILDS = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
TRIO = ("torch", "torchrec", *BUILDS.values())
DRIVER = "libnvidia-ml.so.1"
SYSTEM_LIBRARIES = {"libstdc++.so.6": "libstdc++6", "libgcc_s.so.1": "libgcc-s1", "libz.so.1": "zlib1g"}
"""Shared libraries beyond the C library that the wheels of pyproject.toml do not bring, and their Debian packages."""
GIB = 2**30
PROBE_SECONDS = 300

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the report; `fix` is what to type or do, empty where nothing is wrong."""

    name: str
    status: Status
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Installer:
    """Words what to type, for uv or pip and for the fbgemm build that suits the machine."""

    uv: bool
    build: Literal["cpu", "cuda"]
    required: Mapping[str, str]
    """Package name to requirement, such as `"mlflow": "mlflow==3.17.*"`."""

    def install(self, names: Iterable[str]) -> str:
        """Installs these packages; torchrec without its dependencies, since they ask for fbgemm's CUDA build."""
        if self.uv:
            return f"uv sync --extra {self.build}"
        names = list(names)
        others = [shlex.quote(self.required[name]) for name in names if name != "torchrec"]
        commands = ["pip install " + " ".join(others)] if others else []
        commands += [f"pip install --no-deps {self.required['torchrec']}"] if "torchrec" in names else []
        return " && ".join(commands)

    def install_all(self) -> str:
        """Installs everything the project needs."""
        other = "cuda" if self.build == "cpu" else "cpu"
        return self.install(name for name in self.required if name != BUILDS[other])

    def reinstall_fbgemm(self) -> str:
        """Removes both builds before installing one, since removing either deletes files of the other."""
        build = BUILDS[self.build]
        if self.uv:
            return f"uv sync --extra {self.build} --reinstall-package {build}"
        return f"pip uninstall -y {' '.join(BUILDS.values())} && pip install {self.required[build]}"


@dataclass(frozen=True)
class Probe:
    """What the process of `probe` reported: how far it came, and what torch sees."""

    stage: str = "start Python"
    error: str | None = None
    seconds: float = 0.0
    torch_cuda: str | None = None
    """CUDA release that torch was built for; None for a CPU build."""
    cards: Sequence[tuple[str, int]] = ()
    """Name and bytes of memory of each CUDA device."""
    bf16: Mapping[str, bool] = field(default_factory=dict)
    """Whether `cpu` and `cuda` multiply bf16 matrices in hardware."""


def check_python(version: tuple[int, int, int]) -> Check:
    """Python 3.11 or 3.12."""
    found = ".".join(map(str, version))
    if (3, 11) <= version[:2] <= (3, 12):
        return Check("Python", "ok", found)
    fix = "uv run --python 3.11 --extra cpu python -m pipelines.doctor  # Python 3.11 or 3.12"
    return Check("Python", "fail", found, fix)


def check_platform(system: str, machine: str) -> Check:
    """fbgemm has wheels for Linux on x86-64 and 64-bit ARM only."""
    found = f"{system} {machine}"
    if system == "Linux" and machine in ("x86_64", "aarch64"):
        return Check("platform", "ok", found)
    fix = "fbgemm has no build for this machine: use Linux on x86_64 or aarch64 (on Windows WSL, on a Mac a container)"
    return Check("platform", "fail", found, fix)


def check_system_files(missing_libraries: Iterable[str], has_time_zones: bool) -> Check:
    """Files of the operating system that the wheels rely on."""
    missing = {name: SYSTEM_LIBRARIES[name] for name in missing_libraries}
    if not has_time_zones:
        missing["the time zone database"] = "tzdata"
    if not missing:
        return Check("system files", "ok", "shared libraries and time zones are there")
    fix = f"apt-get install -y {' '.join(missing.values())}"
    return Check("system files", "fail", f"missing: {', '.join(missing)}", fix)


def check_trio(versions: Mapping[str, str], installer: Installer) -> Check:
    """Torch, torchrec and fbgemm go together; `versions` holds the installed packages only."""
    installed = [build for build in BUILDS.values() if build in versions]
    builds = installed or [BUILDS[installer.build]]
    names = ["torch", "torchrec", *builds]
    problems = [_problem(name, versions.get(name), installer.required[name]) for name in names]
    if not any(problems):
        found = ", ".join(f"{name} {versions[name]}" for name in names)
        return Check("torch trio", "ok", found)
    parts = [problem or f"{name} {versions[name]}" for name, problem in zip(names, problems, strict=True)]
    fix = installer.install(["torch", "torchrec", BUILDS[installer.build]]) + "  # the three releases go together"
    return Check("torch trio", "fail", ", ".join(parts), fix)


def check_fbgemm_build(versions: Mapping[str, str], has_driver: bool, cards: int, installer: Installer) -> Check:
    """One build of fbgemm, the one that suits the machine."""
    cpu, cuda = (BUILDS[build] in versions for build in ("cpu", "cuda"))
    if cpu and cuda:
        found = "fbgemm-gpu and fbgemm-gpu-cpu are both installed, into the same folder: one breaks the other"
        return Check("fbgemm build", "fail", found, installer.reinstall_fbgemm())
    if not cpu and not cuda:
        return Check("fbgemm build", "fail", "none is installed", installer.install([BUILDS[installer.build]]))
    if cuda and not has_driver:
        found = f"CUDA build, but this machine has no NVIDIA driver ({DRIVER})"
        return Check("fbgemm build", "fail", found, installer.reinstall_fbgemm())
    if cpu and cards:
        found = f"CPU build, but torch sees {cards} CUDA device{'s' if cards > 1 else ''}: tables cannot train there"
        fix = installer.reinstall_fbgemm() + "  # or train with --training.device cpu"
        return Check("fbgemm build", "fail", found, fix)
    return Check("fbgemm build", "ok", "CUDA build" if cuda else "CPU build")


def check_tables(probe: Probe, installer: Installer) -> Check:
    """The libraries import, and an embedding lookup gives the right sum."""
    if probe.stage == "done":
        return Check("embedding lookup", "ok", f"right, after {probe.seconds:.0f} s of imports")
    error = probe.error or "no answer"
    found = f"could not {probe.stage}: {error}"
    if DRIVER in error or "libcuda.so" in error:
        fix = installer.reinstall_fbgemm()
    elif missing := next((name for name in SYSTEM_LIBRARIES if name in error), None):
        fix = f"apt-get install -y {SYSTEM_LIBRARIES[missing]}"
    elif "SIGILL" in error:
        fix = "this processor lacks instructions of the wheels (AVX2 on x86-64): use another machine"
    elif error.startswith("no answer"):
        fix = "python -m pipelines.doctor  # once more: a first import from a slow disk takes long"
    elif "fbgemm" in probe.stage + error:
        fix = installer.reinstall_fbgemm()
    elif installer.uv:
        names = ("torch", "torchrec", BUILDS[installer.build])
        fix = " ".join(["uv sync --extra", installer.build, *(f"--reinstall-package {name}" for name in names)])
    else:
        needed = installer.install(["torch", "torchrec", BUILDS[installer.build]])
        fix = needed.replace("pip install", "pip install --force-reinstall")
    return Check("embedding lookup", "fail", found, fix)


def check_packages(versions: Mapping[str, str], installer: Installer) -> list[Check]:
    """The other packages, within the ranges of pyproject.toml: a line for the central ones, one for all the rest."""
    central = ("mlflow", "pandas", "pyarrow")
    rest = [name for name in installer.required if name not in (*TRIO, *central)]
    checks = []
    for title, names in [*((name, [name]) for name in central), ("other packages", rest)]:
        problems = {name: _problem(name, versions.get(name), installer.required[name]) for name in names}
        wrong = [name for name in names if problems[name]]
        if wrong:
            found = ", ".join(problems[name] or "" for name in wrong)
            checks.append(Check(title, "fail", found, installer.install(wrong)))
        else:
            found = versions[title] if title in central else f"{len(names)} within the ranges of pyproject.toml"
            checks.append(Check(title, "ok", found))
    return checks


def check_uvicorn(on_path: str | None, installed: str | None, installer: Installer) -> Check:
    """`mlflow models serve` starts the first `uvicorn` on PATH; `installed` is the one of this environment."""
    if installed is None:
        found = f"{on_path} belongs to another environment" if on_path else "not found"
        fix = "pip install --force-reinstall uvicorn"
        if installer.uv:
            fix = f"uv sync --extra {installer.build} --reinstall-package uvicorn"
        return Check("uvicorn", "fail", found, fix)
    if on_path is None or Path(on_path).resolve() != Path(installed).resolve():
        found = f"{installed} is not the one on PATH ({on_path or 'none'}): `mlflow models serve` would not find it"
        return Check("uvicorn", "warn", found, f"export PATH={shlex.quote(str(Path(installed).parent))}:$PATH")
    return Check("uvicorn", "ok", installed)


def check_cpu(cores: int, threads: str | None) -> Check:
    """Cores, and how many of them OpenMP takes for each process."""
    found = f"{cores} core{'s' if cores > 1 else ''}, OMP_NUM_THREADS {threads or 'unset'}"
    if threads is None:
        note = " (torchrun then takes 1: set it to cores / processes)" if cores > 1 else ""
        return Check("CPU", "ok", found + note)
    if not threads.isdecimal() or not 1 <= int(threads) <= cores:
        return Check("CPU", "warn", found, f"export OMP_NUM_THREADS={cores}  # under torchrun: cores / processes")
    if int(threads) == 1 < cores:
        return Check("CPU", "warn", f"{found}: a single process uses one core", "unset OMP_NUM_THREADS")
    return Check("CPU", "ok", found)


def check_cuda(probe: Probe, has_driver: bool) -> Check:
    """The CUDA devices that torch sees."""
    if probe.cards:
        found = ", ".join(f"{name} {memory / GIB:.0f} GiB" for name, memory in probe.cards)
        return Check("CUDA devices", "ok", found)
    if has_driver:
        found = "an NVIDIA driver is here, but torch sees no device"
        release = f"CUDA {probe.torch_cuda}" if probe.torch_cuda else "no CUDA (a CPU build)"
        fix = f"nvidia-smi  # torch is built for {release}, which the driver has to support; see CUDA_VISIBLE_DEVICES"
        return Check("CUDA devices", "warn", found, fix)
    return Check("CUDA devices", "ok", "none: models train on the CPU")


def check_bf16(probe: Probe) -> Check:
    """Where mixed precision pays; without it training takes fp32, which is no fault."""
    if not probe.bf16:
        return Check("bf16", "warn", "unknown, since torch could not be asked", "fix the embedding lookup first")
    found = ", ".join(f"{device}: {'fast' if fast else 'no, fp32 is used'}" for device, fast in probe.bf16.items())
    return Check("bf16", "ok", found)


def check_memory(total: int, available: int) -> Check:
    """Main memory in bytes."""
    found = f"{available / GIB:.1f} GiB available of {total / GIB:.1f} GiB"
    if available < 2 * GIB:
        return Check("memory", "warn", found, "close other programs, or take a smaller log (2 GiB is little)")
    return Check("memory", "ok", found)


def check_disk(free: int, folder: str) -> Check:
    """Free bytes where features, checkpoints and MLflow's files go."""
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if free < GIB:
        return Check("disk", "fail", found, "free at least 1 GiB, or work in a folder on another disk")
    if free < 5 * GIB:
        return Check("disk", "warn", found, "free 5 GiB, or work in a folder on another disk")
    return Check("disk", "ok", found)


def read_requirements(pyproject: Path) -> dict[str, str]:
    """Package name to requirement: the dependencies, both builds of fbgemm, and what torchrec needs besides fbgemm."""
    import tomllib

    content = tomllib.loads(pyproject.read_text())
    project = content["project"]
    lines = [*project["dependencies"], *(project["optional-dependencies"][build][0] for build in BUILDS)]
    for package in content["tool"]["uv"]["dependency-metadata"]:
        lines += package["requires-dist"]
    found = [(re.match(r"[\w.-]+", line), line) for line in lines]
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

        from mmoe_rec.devices import has_fast_bf16

        devices = [torch.device(kind) for kind in ("cpu", *["cuda"] * torch.cuda.is_available())]
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        report(
            torch_cuda=torch.version.cuda,
            cards=[(card.name, card.total_memory) for card in cards],
            bf16={device.type: has_fast_bf16(device) for device in devices},
            stage="import fbgemm_gpu",
        )
        import fbgemm_gpu  # noqa: F401

        report(stage="import torchrec")
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

        report(stage="look up an embedding")
        table = EmbeddingBagConfig(name="table", embedding_dim=4, num_embeddings=3, feature_names=["feature"])
        tables = EmbeddingBagCollection(tables=[table])
        torch.nn.init.ones_(tables.embedding_bags["table"].weight)
        ids = KeyedJaggedTensor.from_lengths_sync(["feature"], torch.tensor([0, 2, 1]), torch.tensor([2, 1]))
        pooled = tables(ids)["feature"]
        if pooled.tolist() != [[2.0] * 4, [1.0] * 4]:
            raise ArithmeticError(f"expected sums of 2 and 1, found {pooled.tolist()}")
        report(stage="done")
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        report(error=f"{type(error).__name__}: {lines[-1]}")


def run_probe() -> Probe:
    """Runs `probe` in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", "from pipelines.doctor import probe; probe()"]
    started = time.perf_counter()
    crash = None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
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
    required = read_requirements(ROOT / "pyproject.toml")
    with_cuda = has_driver and platform.machine() == "x86_64"  # fbgemm's CUDA build has no other wheel
    installer = Installer(made_by_uv(Path(sys.prefix)), "cuda" if with_cuda else "cpu", required)
    if find_spec("packaging") is None or find_spec("rich") is None:
        found = f"{sys.executable} lacks the project's packages"
        again = f"uv run --extra {installer.build} python -m pipelines.doctor"
        return [*checks, Check("packages", "fail", found, again if installer.uv else installer.install_all())]

    versions = installed_versions(required)
    probed = run_probe()
    return [
        *checks,
        check_system_files((name for name in SYSTEM_LIBRARIES if not _loads(name)), _has_time_zones()),
        check_trio(versions, installer),
        check_fbgemm_build(versions, has_driver, len(probed.cards), installer),
        check_tables(probed, installer),
        *check_packages(versions, installer),
        check_uvicorn(shutil.which("uvicorn"), installed_script("uvicorn"), installer),
        check_cpu(len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")),
        check_cuda(probed, has_driver),
        check_bf16(probed),
        check_memory(*_memory()),
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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON: `ok` and a list of `checks`")
    options = parser.parse_args(argv)
    with nullcontext() if options.json else _spinner():
        checks = run_checks()
    failed = any(check.status == "fail" for check in checks)
    if options.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        show(checks)
    raise SystemExit(1 if failed else 0)


def _problem(name: str, version: str | None, requirement: str) -> str | None:
    from packaging.requirements import Requirement

    needed = Requirement(requirement).specifier
    if version is None:
        return f"{name} is missing"
    return None if needed.contains(version, prereleases=True) else f"{name} {version} (needs {needed})"


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


if __name__ == "__main__":
    main()
