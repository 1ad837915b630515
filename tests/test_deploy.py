"""The Dockerfile and the Kubernetes manifest of docs/how-to/deploy fit the package, the server and each other."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import click
import pytest
import yaml
from starlette.routing import Route

from mmoe_rec.cli.main import commands
from mmoe_rec.cli.serve import TOKEN_VARIABLE, serve
from mmoe_rec.server.app import LIVENESS_PATH, Application
from mmoe_rec.server.options import ServerOptions

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-to" / "deploy.md"
DOCKERFILE = ROOT / "docs" / "how-to" / "deploy" / "Dockerfile"
MANIFEST = ROOT / "docs" / "how-to" / "deploy" / "kubernetes.yaml"

INSTRUCTIONS = {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN"}
INSTRUCTIONS |= {"SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}


def dockerfile() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return [
        (name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in text.splitlines()) if name
    ]


def copied_paths() -> list[str]:
    """Return the paths that the Dockerfile copies from the project's folder."""
    copies = [shlex.split(rest) for name, rest in dockerfile() if name == "COPY" and "--from=" not in rest]
    return [source for *sources, _ in copies for source in sources]


def manifest() -> dict[str, dict[str, Any]]:
    """Return the objects of the manifest by kind."""
    objects = [*yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))]
    assert all({"apiVersion", "kind", "metadata", "spec"} == item.keys() for item in objects)
    return {item["kind"]: item for item in objects}


def pod() -> dict[str, Any]:
    return manifest()["Deployment"]["spec"]["template"]["spec"]


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return only


def parse_serve(words: list[str]) -> dict[str, Any]:
    """Parse the command line of a container. Returns the options of `mmoe-rec serve`."""
    program, command, *options = words
    assert (program, command) == ("mmoe-rec", "serve")
    return serve.make_context(command, options).params


def server_paths() -> set[str]:
    models: Any = SimpleNamespace(options=ServerOptions(), current=MagicMock())
    return {route.path for route in Application(models)._app.routes if isinstance(route, Route)}


def test_the_dockerfile_has_known_instructions_and_ends_without_root() -> None:
    names = [name for name, _ in dockerfile()]
    assert names[0] == "FROM"
    assert set(names) <= INSTRUCTIONS
    last_stage = dockerfile()[len(names) - 1 - names[::-1].index("FROM") :]
    (user,) = (rest for name, rest in last_stage if name == "USER")
    assert int(user) == pod()["securityContext"]["runAsUser"] > 0
    stages = {rest.split(" AS ")[1] for name, rest in dockerfile() if name == "FROM" and " AS " in rest}
    assert {stage for _, rest in dockerfile() for stage in re.findall(r"--from=(\S+)", rest)} <= stages


def test_the_image_has_all_files_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {*wheel["packages"], *wheel["force-include"]}
    assert {*copied_paths()} == needed
    assert all((ROOT / path).exists() for path in copied_paths())


def test_the_image_installs_extras_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (install,) = (rest for name, rest in dockerfile() if name == "RUN" and "-r pyproject.toml" in rest)
    extras = re.findall(r"--extra (\S+)", install)
    assert "cpu" in extras
    assert {*extras} <= project["optional-dependencies"].keys()
    version = next(re.search(r"python:(\d+\.\d+)-slim", rest) for name, rest in dockerfile() if name == "FROM")
    assert version
    low, high = (tuple(map(int, text.split("."))) for text in re.findall(r"\d+\.\d+", project["requires-python"]))
    assert low <= tuple(map(int, version[1].split("."))) < high


def test_the_image_runs_a_command_of_the_program() -> None:
    (entry_point,), (command,) = (
        [json.loads(rest) for name, rest in dockerfile() if name == kind] for kind in ("ENTRYPOINT", "CMD")
    )
    assert entry_point == ["mmoe-rec"]
    assert command[0] in commands.list_commands(click.Context(commands))


def test_the_deployment_has_the_fields_that_kubernetes_requires() -> None:
    deployment, service = manifest()["Deployment"], manifest()["Service"]
    assert (deployment["apiVersion"], service["apiVersion"]) == ("apps/v1", "v1")
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", item["metadata"]["name"]) for item in (deployment, service))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    assert {"name", "image"} <= container().keys()
    mounts, volumes = ({item["name"] for item in items} for items in (container()["volumeMounts"], pod()["volumes"]))
    assert mounts == volumes
    assert {*container()["resources"]["requests"]} == {"cpu", "memory"}


def test_ports_match_the_server() -> None:
    options = parse_serve([*container()["command"], *container()["args"]])
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"http": options["port"]}
    (exposed,) = (int(rest) for name, rest in dockerfile() if name == "EXPOSE")
    assert exposed == options["port"]
    (service_port,) = manifest()["Service"]["spec"]["ports"]
    assert service_port["targetPort"] in ports
    assert options["host"] == "0.0.0.0"


def test_probes_use_the_pages_of_the_server() -> None:
    probes = {name: container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": LIVENESS_PATH,
        "readiness": "/health",
        "liveness": LIVENESS_PATH,
    }
    assert {probe["path"] for probe in probes.values()} <= server_paths()
    assert {probe["port"] for probe in probes.values()} == {"http"}


def test_a_pod_has_the_time_to_answer_all_calls() -> None:
    options = parse_serve([*container()["command"], *container()["args"]])
    assert pod()["terminationGracePeriodSeconds"] > options["drain_seconds"] + options["grace"]
    readiness = container()["readinessProbe"]
    assert options["drain_seconds"] > readiness["periodSeconds"] * readiness["failureThreshold"]
    assert manifest()["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_the_environment_has_the_variables_that_the_server_reads() -> None:
    assert [variable["name"] for variable in container()["env"]] == ["MLFLOW_TRACKING_URI", TOKEN_VARIABLE]
    assert parse_serve([*container()["command"], *container()["args"]])["tracking_uri"] is None
    assert container()["resources"]["requests"]["cpu"] == str(
        parse_serve([*container()["command"], *container()["args"]])["workers"]
    )


@pytest.mark.parametrize("line", re.findall(r"^docker (?:build|run) .*$", PAGE.read_text("utf-8"), re.MULTILINE))
def test_docker_commands_of_the_page(line: str) -> None:
    words = shlex.split(line)
    if words[1] == "build":
        assert ROOT / words[words.index("-f") + 1] == DOCKERFILE
        return
    image = words.index("ranking:1")
    command_name, *options = words[image + 1 :]
    command = commands.get_command(click.Context(commands), command_name)
    assert command is not None
    assert command.make_context(command_name, options)
