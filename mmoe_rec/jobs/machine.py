"""What the doctor makes of what it found: for each fact of a machine, whether it is right, and what to type if not.

Nothing here looks at the machine; `mmoe_rec.cli.doctor` does.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

BUILDS = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
TRIO = ("torch", "torchrec", *BUILDS.values())
TOGETHER = {
    "2.11": ("1.6.1", "1.6.0"),
    "2.12": ("1.7.0", "1.7.0"),
    "2.13": ("1.8.0", "1.8.0"),
    "2.14": ("1.9.2", "1.9.0"),
}
"""Release of torch -> of torchrec and of fbgemm, built for it and tried with it. By default the last of them."""
DRIVER = "libnvidia-ml.so.1"
TORCHREC_NEEDS = ("pyre-extensions", "tensordict", "torchmetrics==1.0.3", "tqdm")
"""What torchrec asks for besides fbgemm, whose build it would choose."""
SYSTEM_LIBRARIES = {"libstdc++.so.6": "libstdc++6", "libgcc_s.so.1": "libgcc-s1", "libz.so.1": "zlib1g"}
"""Shared libraries beyond the C library that the wheels of pyproject.toml do not bring, and their Debian packages."""
PLAIN = "plain PyTorch tables, one process"
GIB = 2**30
PYTHONS = (3, 11), (3, 14)
"""The oldest and the newest Python, as `requires-python` in pyproject.toml says."""

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

    def beside(self, torch: str | None) -> Installer:
        """The same, asking for the torchrec and fbgemm that go with this release of torch; by default with the last."""
        release = ".".join((torch or "").split(".")[:2])
        if release not in TOGETHER:
            release = list(TOGETHER)[-1]
        torchrec, fbgemm = TOGETHER[release]
        trio = {"torch": f"torch=={release}.*", "torchrec": f"torchrec=={torchrec}"}
        trio |= {build: f"{build}=={fbgemm}" for build in BUILDS.values()}
        return replace(self, required=dict(self.required) | trio)

    def install(self, names: Iterable[str]) -> str:
        """Installs these packages; torchrec without its dependencies, since they ask for fbgemm's CUDA build."""
        if self.uv:
            return f"uv sync --extra {self.build}"
        names = list(names)
        others = [shlex.quote(self.required[name]) for name in names if name != "torchrec"]
        commands = ["pip install " + " ".join(others)] if others else []
        commands += [f"pip install --no-deps {self.required['torchrec']}"] if "torchrec" in names else []
        return " && ".join(commands)

    def install_sharded(self) -> str:
        """Installs torchrec and fbgemm, and what torchrec needs besides."""
        needs = [name for name, line in self.required.items() if line in TORCHREC_NEEDS]
        return self.install([*needs, BUILDS[self.build], "torchrec"])

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
    choices: Mapping[str, str] = field(default_factory=dict)
    """For `cpu` and `cuda`, what a training of common size would compute in."""


def check_python(version: tuple[int, int, int]) -> Check:
    """One of `PYTHONS`."""
    found = ".".join(map(str, version))
    oldest, newest = PYTHONS
    if oldest <= version[:2] <= newest:
        return Check("Python", "ok", found)
    named = " to ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    fix = f"uv run --python 3.11 --extra cpu mmoe-rec doctor  # Python {named}"
    return Check("Python", "fail", found, fix)


def check_platform(system: str, machine: str) -> Check:
    """fbgemm has wheels for Linux on x86-64 and 64-bit ARM only; elsewhere tables are plain PyTorch."""
    found = f"{system} {machine}"
    if has_fbgemm(system, machine):
        return Check("platform", "ok", found)
    if system == "Windows":
        fix = "folders can't be locked on Windows: use Linux, in WSL or a container"
        return Check("platform", "fail", found, fix)
    fix = "use Linux on x86_64 or aarch64 (on a Mac a container) for sharded tables, or several processes"
    return Check("platform", "warn", f"{found}: fbgemm has no build for it; {PLAIN}", fix)


def has_fbgemm(system: str, machine: str) -> bool:
    """Whether there is a build of fbgemm for a machine."""
    return system == "Linux" and machine in ("x86_64", "aarch64")


def without_torchrec(versions: Mapping[str, str]) -> bool:
    """Whether neither torchrec nor a build of fbgemm is installed, so that tables are plain PyTorch."""
    return not any(name in versions for name in ("torchrec", *BUILDS.values()))


def check_system_files(missing_libraries: Iterable[str], has_time_zones: bool) -> Check:
    """Files of the operating system that the wheels rely on."""
    missing = {name: SYSTEM_LIBRARIES[name] for name in missing_libraries}
    if not has_time_zones:
        missing["the time zone database"] = "tzdata"
    if not missing:
        return Check("system files", "ok", "shared libraries and time zones are there")
    fix = f"apt-get install -y {' '.join(missing.values())}"
    return Check("system files", "fail", f"missing: {', '.join(missing)}", fix)


def check_trio(versions: Mapping[str, str], installer: Installer, offered: bool = True) -> Check:
    """Torch, torchrec and fbgemm go together; `versions` holds the installed packages only.

    offered: whether there is a build of fbgemm for this machine.
    """
    torch = _problem("torch", versions.get("torch"), installer.required["torch"])
    if without_torchrec(versions) and torch is None:
        found = f"torch {versions['torch']}, without torchrec and fbgemm: {PLAIN}"
        if not offered:
            return Check("torch trio", "ok", found)
        return Check("torch trio", "warn", found, installer.install_sharded() + "  # for sharded tables")
    installed = [build for build in BUILDS.values() if build in versions]
    builds = installed or [BUILDS[installer.build]]
    names = ["torch", "torchrec", *builds]
    problems = [_problem(name, versions.get(name), installer.required[name]) for name in names]
    if not any(problems):
        found = ", ".join(f"{name} {versions[name]}" for name in names)
        return Check("torch trio", "ok", found)
    parts = [problem or f"{name} {versions[name]}" for name, problem in zip(names, problems, strict=True)]
    wanted = ["torch"] if problems[0] else []  # one that is right stays, which may be what its machine came with
    fix = installer.install([*wanted, "torchrec", BUILDS[installer.build]]) + "  # the three releases go together"
    return Check("torch trio", "fail", ", ".join(parts), fix)


def check_fbgemm_build(versions: Mapping[str, str], has_driver: bool, cards: int, installer: Installer) -> Check:
    """One build of fbgemm, the one that suits the machine."""
    cpu, cuda = (BUILDS[build] in versions for build in ("cpu", "cuda"))
    if cpu and cuda:
        found = "fbgemm-gpu and fbgemm-gpu-cpu are both installed, into the same folder: one breaks the other"
        return Check("fbgemm build", "fail", found, installer.reinstall_fbgemm())
    if without_torchrec(versions) and not cards:
        return Check("fbgemm build", "ok", "none is needed without torchrec")
    if cards and not cuda:
        devices = f"{cards} CUDA device{'s' if cards > 1 else ''}"
        found = f"{'CPU build' if cpu else 'none'}, but torch sees {devices}: tables cannot train there"
        install = installer.reinstall_fbgemm() if cpu else installer.install_sharded()
        return Check("fbgemm build", "fail", found, install + "  # or train with --training.device cpu")
    if not cpu and not cuda:
        return Check("fbgemm build", "fail", "none is installed", installer.install([BUILDS[installer.build]]))
    if cuda and not has_driver:
        found = f"CUDA build, but this machine has no NVIDIA driver ({DRIVER})"
        return Check("fbgemm build", "fail", found, installer.reinstall_fbgemm())
    return Check("fbgemm build", "ok", "CUDA build" if cuda else "CPU build")


def check_tables(probe: Probe, installer: Installer) -> Check:
    """The libraries import, and an embedding lookup gives the right sum."""
    if probe.stage == "done":
        return Check("embedding lookup", "ok", f"right, after {probe.seconds:.0f} s of imports")
    error = probe.error or "no answer"
    found = f"could not {probe.stage}: {error}"
    if DRIVER in error or "libcuda.so" in error:
        fix = installer.reinstall_fbgemm()
    elif "libcudart.so" in error:
        built = f"for CUDA {probe.torch_cuda}" if probe.torch_cuda else "without CUDA"
        fix = f"{_forced(installer)}  # torch is built {built}, fbgemm for another release of CUDA"
    elif missing := next((name for name in SYSTEM_LIBRARIES if name in error), None):
        fix = f"apt-get install -y {SYSTEM_LIBRARIES[missing]}"
    elif "SIGILL" in error:
        fix = "this processor lacks instructions of the wheels (AVX2 on x86-64): use another machine"
    elif error.startswith("no answer"):
        fix = "mmoe-rec doctor  # once more: a first import from a slow disk takes long"
    elif "fbgemm" in probe.stage + error:
        fix = installer.reinstall_fbgemm()
    else:
        fix = _forced(installer)
    return Check("embedding lookup", "fail", found, fix)


def _forced(installer: Installer) -> str:
    """Installs the three anew, whatever is there."""
    names = ("torch", "torchrec", BUILDS[installer.build])
    if installer.uv:
        return " ".join(["uv sync --extra", installer.build, *(f"--reinstall-package {name}" for name in names)])
    return installer.install(names).replace("pip install", "pip install --force-reinstall")


def check_packages(versions: Mapping[str, str], installer: Installer) -> list[Check]:
    """The other packages, within the ranges of pyproject.toml: a line for the central ones, one for all the rest."""
    central = ("mlflow", "pandas", "pyarrow")
    rest = [name for name in installer.required if name not in (*TRIO, *central)]
    if without_torchrec(versions):
        rest = [name for name in rest if installer.required[name] not in TORCHREC_NEEDS]
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


def check_choices(probe: Probe) -> Check:
    """What a training of common size would compute in, by measurement; each training measures its own steps."""
    if not probe.choices:
        return Check(
            "measured choices", "warn", "unknown, since nothing could be run", "fix the embedding lookup first"
        )
    found = "; ".join(f"{device}: {choices}" for device, choices in probe.choices.items())
    return Check("measured choices", "ok", found)


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


def _problem(name: str, version: str | None, requirement: str) -> str | None:
    from packaging.requirements import Requirement

    needed = Requirement(requirement).specifier
    if version is None:
        return f"{name} is missing"
    return None if needed.contains(version, prereleases=True) else f"{name} {version} (needs {needed})"
