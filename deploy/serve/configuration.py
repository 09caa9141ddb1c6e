"""Configuration of one TorchServe: properties of the frontend, environment of the workers, the model to load."""

from __future__ import annotations

import json
import os
import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from deploy.versions import HeldArchive, hold

from .home import ServerHome
from .processes import LOOPBACK, ServeError

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
CONFIG = REPO / "config.properties"
WORKER_ENV = HERE / "local.env"
LOG_CONFIG = HERE / "log4j2.xml"
METRICS_CONFIG = HERE / "metrics.yaml"

MANIFEST = "MAR-INF/MANIFEST.json"

CORS_VARIABLE = "CORS_ORIGINS"
PUBLIC_METRICS_VARIABLE = "PUBLIC_METRICS"  # whether HAProxy serves the worker's page of metrics at /metrics
METRICS_PORT_VARIABLE = "LLAVA_METRICS_PORT"  # the port of that page on loopback, for the worker
_ORIGIN = re.compile(r"\*|null|https?://[A-Za-z0-9.:\[\]-]+")

HEADER_KEYS = {  # the frontend's property and the worker's variable for one header must agree
    "ts_header_key_sequence_id": "TS_REQUEST_SEQUENCE_ID",
    "ts_header_key_sequence_end": "TS_REQUEST_SEQUENCE_END",
}


def render_properties(config: Path, ports: Mapping[str, int], changes: Mapping[str, str]) -> dict[str, str]:
    """Return the properties of `config` with this server's ports and absolute paths. `changes` win over both."""
    base = read_properties(config)
    folder = config.resolve().parent
    metrics_config = folder / base["metrics_config"] if "metrics_config" in base else METRICS_CONFIG
    return {
        **base,
        **{f"{key}_address": f"http://{LOOPBACK}:{ports[key]}" for key in ("inference", "management", "metrics")},
        "grpc_inference_port": str(ports["grpc_inference"]),
        "grpc_management_port": str(ports["grpc_management"]),
        "initial_worker_port": str(ports["worker"]),
        "metrics_config": str(metrics_config.resolve()),
        **changes,
    }


def worker_env(home: ServerHome, changes: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of java, which the workers inherit."""
    env = {**os.environ, **read_env_file(WORKER_ENV)}
    env.pop("TS_CONFIG_FILE", None)  # it would win over our configuration without a message
    env.pop("PYTHONPATH", None)  # it would come before the archive in the worker's sys.path
    temp = str(home.temp)
    logs = str(home.logs)
    env |= {"TMPDIR": temp, "TEMP": temp, "LOG_LOCATION": logs, "METRICS_LOCATION": logs}
    return {**env, **changes}


def cors_origins(env: Mapping[str, str]) -> list[str]:
    """Return the origins whose web pages may call the server, `*` for all. Raise `ServeError` for any other word."""
    origins = env.get(CORS_VARIABLE, "").split()
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ServeError(f"{CORS_VARIABLE} must be origins such as https://example.com, or *, got {origin!r}")
    return origins


def has_public_metrics(env: Mapping[str, str]) -> bool:
    """Return whether /metrics is public; by default it is not. Raise `ServeError` for any word but on and off."""
    word = env.get(PUBLIC_METRICS_VARIABLE) or "off"
    if word not in ("on", "off"):
        raise ServeError(f"{PUBLIC_METRICS_VARIABLE} must be on or off, got {word!r}")
    return word == "on"


def check_headers(properties: Mapping[str, str], env: Mapping[str, str]) -> None:
    """Raise `ServeError` if frontend and worker read different session headers: sessions would be mixed up."""
    for key, variable in HEADER_KEYS.items():
        if properties.get(key) != env.get(variable):
            raise ServeError(
                f"session headers disagree: {key}={properties.get(key)} for the frontend, "
                f"{variable}={env.get(variable)} for the worker"
            )


def hold_archive(model_store: Path, name: str) -> HeldArchive:
    """Find the archive of that name, in any format, and keep its version on the disk. Raise `ServeError`."""
    found = [name + suffix for suffix in ("", ".mar", ".tar.gz") if (model_store / (name + suffix)).exists()]
    if not found:
        raise ServeError(f"no archive {name!r} in {model_store}; pack one: ./build_mar.sh --model models/shapes")
    if len(found) > 1:
        raise ServeError(f"{' and '.join(found)} are both in {model_store}; remove one")
    return hold(model_store / found[0])


def model_version(archive: Path) -> str:
    """Return the version in an archive's manifest, which is a part of the model's path. Raise `ServeError`."""
    try:
        version = json.loads(_manifest(archive))["model"]["modelVersion"]
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError, zipfile.BadZipFile) as err:
        raise ServeError(f"{archive} has no readable {MANIFEST} with a model version: {type(err).__name__}") from None
    return str(version)


def _manifest(archive: Path) -> bytes:
    if archive.is_dir():
        return (archive / MANIFEST).read_bytes()
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as mar:
            return mar.read(MANIFEST)
    with tarfile.open(archive) as tarball:
        member = tarball.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{MANIFEST}")
        return member.read() if member else b""


def read_properties(path: Path) -> dict[str, str]:
    """Read a Java properties file with `key=value` lines and # comments."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith(("#", "!")))
    return {key.strip(): value.strip() for key, value in pairs}


def read_env_file(path: Path) -> dict[str, str]:
    """Read the `export KEY=value` lines of a file that a shell can source as well."""
    return dict(re.findall(r"^export (\w+)=(\S*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
