"""mmoe-rec doctor

Checks this machine and its packages, and says what to type where something is wrong. The exit code is 0 when everything
works, 1 when something has to be fixed; a warning does not change it.

The embedding libraries are imported in a process of their own, so that a library that crashes while it loads is
reported like any other problem. Nothing is installed or changed.
"""

from __future__ import annotations

import ctypes
import json
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from mmoe_rec.cli.main import command

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"  # in the repository; an installed package has none
PROBE = "from mmoe_rec.cli.doctor import probe; probe()"
PROBE_SECONDS = 300
PYTHONS = (3, 11), (3, 14)  # the oldest and the newest, as `requires-python` in pyproject.toml says
BUILDS = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
DRIVER = "libnvidia-ml.so.1"
TOGETHER = {
    "2.11": ("1.6.1", "1.6.0"),
    "2.12": ("1.7.0", "1.7.0"),
    "2.13": ("1.8.0", "1.8.0"),
    "2.14": ("1.9.2", "1.9.0"),
}
"""Release of torch -> of torchrec and of fbgemm, built for it and tried with it. By default the last of them."""
EXTRAS = ("tables-cpu", "tables-cuda", "serve", "tune")  # what the extras cpu and cuda consist of
TORCHREC_NEEDS = ("pyre-extensions", "tensordict", "torchmetrics==1.0.3", "tqdm")
"""What torchrec asks for besides fbgemm, whose build it would choose."""
PLAIN = "plain PyTorch tables, one process"
REMEDIES = {
    "SIGILL": "use another machine: this processor lacks instructions of the wheels (AVX2 on x86-64)",
    "^no answer": "mmoe-rec doctor  # once more: a first import from a slow disk takes long",
    r"lib(stdc\+\+|gcc_s|z|gomp)\.so": "apt-get install -y libstdc++6 libgcc-s1 zlib1g libgomp1",
}
"""What to do about errors of `probe` that hold a pattern."""


@dataclass(frozen=True)
class Check:
    """One line of the report; fix: what to do, empty where nothing is wrong; warns: whether all works as it is."""

    name: str
    text: str
    fix: str = ""
    warns: bool = False

    @property
    def status(self) -> str:
        """ok, warn or fail."""
        return ("warn" if self.warns else "fail") if self.fix else "ok"


@dataclass(frozen=True)
class Machine:
    """What the checks look at.

    required, versions: package name -> requirement (`mlflow==3.17.*`), and installed version; uv: whether uv made the
    environment; has_driver: whether NVIDIA's driver is there; probe: what `probe` reported: `stage`, and maybe `error`,
    `torch_cuda`, `cards` (their names) and `choices`.
    """

    required: Mapping[str, str]
    versions: Mapping[str, str]
    python: tuple[int, int] = sys.version_info[:2]
    system: str = platform.system()
    processor: str = platform.machine()
    uv: bool = True
    has_driver: bool = False
    probe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def build(self) -> str:
        """The extra for this machine; fbgemm's CUDA build has wheels for x86-64 alone."""
        return "cuda" if self.has_driver and self.processor == "x86_64" else "cpu"

    @property
    def offers_fbgemm(self) -> bool:
        """Whether there is a build of fbgemm for this machine."""
        return self.system == "Linux" and self.processor in ("x86_64", "aarch64")

    @property
    def lines(self) -> dict[str, str]:
        """Package name -> requirement; torchrec and fbgemm go with the torch that is there, maybe the machine's own."""
        release = ".".join(self.versions.get("torch", "").split(".")[:2])
        release = release if release in TOGETHER else list(TOGETHER)[-1]
        torchrec, fbgemm = TOGETHER[release]
        builds = {build: f"{build}=={fbgemm}" for build in BUILDS.values()}
        return {**self.required, "torch": f"torch=={release}.*", "torchrec": f"torchrec=={torchrec}", **builds}

    def install(self, *again: str) -> str:
        """What installs everything that the project needs; torchrec without its dependencies, which ask for fbgemm's
        CUDA build. again: what is there and has to be replaced."""
        if self.uv:
            return " ".join(["uv sync --extra", self.build, *(f"--reinstall-package {name}" for name in again)])
        remove = f"pip uninstall -y {' '.join(again)} && " if again else ""
        apart = {"torchrec", *BUILDS.values()} - {BUILDS[self.build]}
        words = [shlex.quote(line) for name, line in self.lines.items() if name not in apart]
        return f"{remove}pip install {' '.join(words)} && pip install --no-deps {self.lines['torchrec']}"

    def problem(self, name: str) -> str | None:
        """What is wrong with the version of a package."""
        from packaging.requirements import Requirement

        needed, version = Requirement(self.lines[name]).specifier, self.versions.get(name)
        if version is None:
            return f"{name} is missing"
        return None if needed.contains(version, prereleases=True) else f"{name} {version} (needs {needed})"


def run_checks(machine: Machine) -> Iterator[Check]:
    """All checks; only the first ones where nothing else could work."""
    oldest, newest, version = (".".join(map(str, each)) for each in (*PYTHONS, machine.python))
    fits = PYTHONS[0] <= machine.python <= PYTHONS[1]
    yield Check("Python", version, "" if fits else f"use Python {oldest} to {newest}, as by uv run --python {oldest}")
    platform, fix, runs = f"{machine.system} {machine.processor}", "", machine.system != "Windows"
    if not runs:
        fix = "use Linux, in WSL or a container: folders can't be locked on Windows"
    elif not machine.offers_fbgemm:
        platform += f": fbgemm has no build for it; {PLAIN}"
        fix = "use Linux on x86_64 or aarch64 (on a Mac a container) for sharded tables, or several processes"
    yield Check("platform", platform, fix, warns=runs)
    if find_spec("packaging") is None:
        yield Check("packages", f"{sys.executable} lacks the project's packages", machine.install())
    elif fits and runs:
        yield _check_packages(machine)
        yield _check_devices(machine)
        yield _check_training(machine)


def _check_packages(machine: Machine) -> Check:
    """All packages are in range, and torch, torchrec and fbgemm go together."""
    versions = machine.versions
    builds = [each for each in BUILDS.values() if each in versions] or [BUILDS[machine.build]]
    left = {*BUILDS.values()} - {*builds}
    is_plain = not versions.keys() & {"torchrec", *BUILDS.values()}
    if is_plain:
        left = {"torchrec", *BUILDS.values(), *(re.split("[=]", line)[0] for line in TORCHREC_NEEDS)}
    names = [name for name in machine.lines if name not in left]
    if wrong := [problem for name in names if (problem := machine.problem(name))]:
        return Check("packages", ", ".join(wrong), machine.install())
    three = [f"{name} {versions[name]}" for name in ("torch", "torchrec", *builds) if name not in left]
    text = f"{', '.join(three)} and {len(names) - len(three)} others go together"
    if not is_plain:
        return Check("packages", text)
    text += f"; without torchrec and fbgemm: {PLAIN}"
    return Check("packages", text, machine.install() if machine.offers_fbgemm else "", warns=True)


def _check_devices(machine: Machine) -> Check:
    """torch sees the cards, and there is one build of fbgemm, the one that suits the machine."""
    there = [each for each in BUILDS.values() if each in machine.versions]
    cards, again = machine.probe.get("cards", ()), [BUILDS[machine.build]] if machine.uv else there
    text, fix = ", ".join(cards) or "no CUDA device: models train on the CPU", machine.install(*again)
    if len(there) > 1:
        return Check("devices", "both builds of fbgemm are installed, into one folder: one breaks the other", fix)
    if there == [BUILDS["cpu"]] and cards:
        fix += "  # or train with --training.device cpu"
        return Check("devices", f"{text}, where tables cannot train without fbgemm's CUDA build", fix)
    if there == [BUILDS["cuda"]] and not machine.has_driver:
        return Check("devices", f"fbgemm's CUDA build, but there is no NVIDIA driver ({DRIVER})", fix)
    if machine.has_driver and not cards:
        release = machine.probe.get("torch_cuda") or "no CUDA"
        fix = f"nvidia-smi  # torch is built for {release}, which the driver has to support; see CUDA_VISIBLE_DEVICES"
        return Check("devices", "an NVIDIA driver is here, but torch sees no device", fix, warns=True)
    return Check("devices", text)


def _check_training(machine: Machine) -> Check:
    """The libraries import, and a model trains for a few steps."""
    stage, error = machine.probe.get("stage", "start Python"), str(machine.probe.get("error", "no answer"))
    if stage == "done":
        choices = "; ".join(f"{device}: {text}" for device, text in machine.probe["choices"].items())
        return Check("training steps", f"a training of common size computes in {choices}")
    fix = next((fix for pattern, fix in REMEDIES.items() if re.search(pattern, error)), "")
    if not fix:
        fix = machine.install("torch", BUILDS[machine.build], "torchrec")
        fix += f"  # torch is built for CUDA {machine.probe.get('torch_cuda')}" if "libcudart.so" in error else ""
    return Check("training steps", f"could not {stage}: {error}", fix)


def read_requirements() -> dict[str, str]:
    """Package name -> requirement: the dependencies, both builds of fbgemm, and what torchrec needs besides fbgemm."""
    if PYPROJECT.is_file():
        import tomllib

        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        lines = [*project["dependencies"], *(line for name in EXTRAS for line in extras[name])]
    else:
        parts = (line.partition(";") for line in metadata.requires("mmoe-rec") or [])
        marked = re.compile(rf"extra == ['\"]({'|'.join(EXTRAS)})['\"]")
        lines = [line.strip() for line, _, marker in parts if not marker or marked.search(marker)]
    return {re.split(r"[^\w.-]", line)[0]: line for line in (*lines, *TORCHREC_NEEDS)}


def find_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed, read without importing them."""
    versions = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def look() -> Machine:
    """What this machine has."""
    required, environment, has_driver = read_requirements(), Path(sys.prefix) / "pyvenv.cfg", False
    with suppress(OSError):
        ctypes.CDLL(DRIVER)
        has_driver = True
    uv = "uv =" in environment.read_text() if environment.is_file() else shutil.which("uv") is not None
    return Machine(required, find_versions(required), uv=uv, has_driver=has_driver, probe=run_probe())


def run_probe() -> dict[str, Any]:
    """What `probe` reports in a process of its own; `error` says how it ended, if not well."""
    words, crash = [sys.executable, "-W", "ignore", "-c", PROBE], None
    try:
        done = subprocess.run(words, cwd=PYPROJECT.parent, capture_output=True, timeout=PROBE_SECONDS, check=False)
        output = done.stdout
        if done.returncode < 0:
            crash = f"died of {signal.Signals(-done.returncode).name}"
        elif done.returncode:
            crash = (done.stderr.decode().strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as late:
        output, crash = late.stdout or b"", f"no answer after {PROBE_SECONDS} seconds"
    lines = [line for line in output.splitlines() if line.startswith(b'{"stage"')]
    facts: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return facts | ({"error": crash} if crash and facts.get("stage") != "done" else {})


def probe() -> None:
    """Prints one JSON line at the start of each stage, so that the last tells where a crash came."""
    facts: dict[str, Any] = {}

    def report(**more: object) -> None:
        facts.update(more)
        print(json.dumps(facts), flush=True)

    try:
        report(stage="import torch")
        import torch

        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = [f"{card.name} {card.total_memory / 2**30:.0f} GiB" for card in cards]
        report(torch_cuda=torch.version.cuda, cards=names)
        if any(map(find_spec, ("fbgemm_gpu", "torchrec"))):
            report(stage="import fbgemm_gpu")
            import fbgemm_gpu  # noqa: F401

            report(stage="import torchrec")
            import torchrec  # noqa: F401

        report(stage="import lightgbm")
        import lightgbm  # noqa: F401

        report(stage="train a model for a few steps")
        from mmoe_rec.training.choices import sample_choices

        devices = [torch.device(kind) for kind in ("cpu", *["cuda"] * torch.cuda.is_available())]
        report(choices={device.type: str(sample_choices(device)) for device in devices}, stage="done")
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        report(error=f"{type(error).__name__}: {lines[-1]}")


@command(__doc__)
def doctor() -> None:
    checks = list(run_checks(look()))
    for check in checks:
        colour = {"ok": "green", "warn": "yellow", "fail": "red"}[check.status]
        click.echo(f"{click.style(f'{check.status:4}', colour)}  {check.name:16}  {check.text}")
    failed, wrong = sum(check.status == "fail" for check in checks), [check for check in checks if check.fix]
    for fix in dict.fromkeys(check.fix for check in wrong):
        names = ", ".join(check.name for check in wrong if check.fix == fix)
        print(f"\n{names}: what to type or do\n    {fix}")
    print(f"\n{failed} to fix, {len(wrong) - failed} to know." if wrong else "\nAll is well.")
    raise SystemExit(1 if failed else 0)
