"""docker-compose.yml, checked without an engine: what it refers to exists, and nothing is open to the network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def interpolated(text: str) -> str:
    """What Compose makes of ``${NAME:-default}`` and ``$$`` in an empty environment."""
    return re.sub(r"\$\$|\$\{\w+:-([^}]*)\}", lambda match: match[1] if match[0] != "$$" else "$", text)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(interpolated((ROOT / "docker-compose.yml").read_text()))
    return document


def test_every_variable_has_a_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert re.findall(r"(?<!\$)\$(?!\$|\{\w+:-[^}]+\})", text) == []


def test_the_services_of_a_small_system_are_there(compose: dict[str, Any]) -> None:
    assert {"postgres", "redis", "rabbitmq", "worker-1", "worker-2", "flower"} <= compose["services"].keys()


def test_what_a_service_refers_to_exists(compose: dict[str, Any]) -> None:
    services = compose["services"]
    always = {name for name, service in services.items() if "profiles" not in service}
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in always, f"{name} needs {other}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[other], f"{name} waits for the health of {other}"
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in compose["volumes"]
        for url in service.get("environment", {}).values():
            host = re.search(r"://(?:[^@/]*@)?([\w-]+)", str(url))
            assert host is None or host[1] in services
        if "build" in service:
            assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_image_copies_only_what_exists() -> None:
    lines = (ROOT / "examples" / "Dockerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert {"pyproject.toml", "pgqrs_celery", "examples"} <= set(copied)
    assert all((ROOT / source).exists() for source in copied)


def compose_command() -> list[str] | None:
    """Docker's Compose plugin, which needs no engine to check a file."""
    if shutil.which("docker") is None:
        return None
    version = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if version.returncode == 0 else None


@pytest.mark.docker
@pytest.mark.skipif(compose_command() is None, reason="Docker's Compose plugin is not installed")
@pytest.mark.parametrize("profile", [[], ["--profile", "redis"], ["--profile", "rabbitmq"]])
def test_compose_accepts_the_file(profile: list[str]) -> None:
    subprocess.run(["docker", "compose", *profile, "config", "--quiet"], cwd=ROOT, check=True)
