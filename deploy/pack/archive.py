"""Build an archive from a checkpoint and the handler, verify it, and make it the current version of its name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy import versions

from .checkpoint import checkpoint_files, weight_files
from .errors import PackError, say
from .job import SUFFIXES, PackedModel, PackJob, format_mib, size_bytes
from .model_config import CONFIG_FILE, render_config, system_prompt
from .source import find_checkpoint

ENTRY_FILE = "llava_handler.py"
PACKAGE_DIR = "llava_sessions"
CHECKPOINT_DIR = "checkpoint"
MANIFEST = "MAR-INF/MANIFEST.json"
SAGEMAKER_TARBALL = "model.tar.gz"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def pack_model(job: PackJob) -> PackedModel:
    """Check, stage, archive and verify a model, then make it the current one of its name. Raise `PackError`.

    The previous archive stays current if a step before the last fails, and on the disk while a server uses it.
    """
    _check_job(job)
    template = _read_text(job.config)
    folder = find_checkpoint(job, system_prompt(template))
    inside = folder if job.weights == "inside" else None
    checkpoint = CHECKPOINT_DIR if inside else str(folder or job.model)
    llava = {"checkpoint": checkpoint, "dtype": job.dtype, "device": job.device}
    given = {key: value for key, value in llava.items() if value is not None}
    config_text, sessions = render_config(template, given, job.sessions)

    with versions.scratch(job.output) as scratch:
        plain = replace(job, format="no-archive") if job.sagemaker else job
        made, expected = _build(plain, scratch, inside, config_text)
        verify(made, plain.format, job.name, expected)
        if job.sagemaker:
            made = _for_sagemaker(made, job.format)
        removed = _swap_in(made, job)
    return PackedModel(
        archive=job.archive,
        size_bytes=size_bytes(job.archive),
        sessions=sessions,
        checkpoint=checkpoint,
        removed=removed,
    )


def _check_job(job: PackJob) -> None:
    if not _MODEL_NAME.fullmatch(job.name):
        raise PackError(f"`--name` must be letters, digits, - and _, a letter or digit first, got {job.name!r}")
    if job.sagemaker and job.weights != "inside":
        raise PackError("`--weights` must be inside with --sagemaker, got beside: an endpoint has no other folder")
    if job.sagemaker and job.format == "default":
        raise PackError("`--format` must be no-archive or tgz with --sagemaker, got default")
    missing = [name for name in (ENTRY_FILE, PACKAGE_DIR) if not (job.handler / name).exists()]
    if missing:
        raise PackError(f"{job.handler} is incomplete", [f"{name} is missing" for name in missing])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as err:
        raise PackError(f"--config {path} cannot be read: {err.strerror}") from err


# --- building ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Workspace:
    """The temporary folders of one run: `stage` is archived, `export` gets the archive, `temp` is the archiver's."""

    stage: Path
    export: Path
    temp: Path
    config: Path

    @classmethod
    def make(cls, scratch: Path, config_text: str) -> _Workspace:
        made = cls(scratch / "stage", scratch / "export", scratch / "tmp", scratch / CONFIG_FILE)
        for folder in (made.stage, made.export, made.temp):
            folder.mkdir()
        made.config.write_text(config_text, encoding="utf-8")
        return made


def _build(job: PackJob, scratch: Path, checkpoint: Path | None, config_text: str) -> tuple[Path, dict[str, int]]:
    """Run the archiver on a staged folder. Return the archive, and each file that it must contain with its size."""
    work = _Workspace.make(scratch, config_text)
    shutil.copytree(
        job.handler / PACKAGE_DIR,
        work.stage / PACKAGE_DIR,
        ignore=shutil.ignore_patterns("__pycache__", ".*", "*.pyc"),
    )
    # The archiver copies every file twice. For a plain folder, the weights are copied once, after the archiver.
    late = weight_files(checkpoint) if checkpoint and job.format == "no-archive" else []
    if checkpoint:
        (work.stage / CHECKPOINT_DIR).mkdir()
        for path in checkpoint_files(checkpoint):
            if path not in late:
                _link(path, work.stage / CHECKPOINT_DIR / path.name)
    staged = [path for path in work.stage.rglob("*") if path.is_file()]
    expected = {path.relative_to(work.stage).as_posix(): path.stat().st_size for path in staged}
    expected[ENTRY_FILE] = (job.handler / ENTRY_FILE).stat().st_size
    expected[CONFIG_FILE] = work.config.stat().st_size

    _run_archiver(job, work)
    made = work.export / (job.name + SUFFIXES[job.format])
    for path in late:
        say(f"copying {path.name}, {format_mib(path.stat().st_size)} ...")
        _clone(path, made / CHECKPOINT_DIR / path.name)
        expected[f"{CHECKPOINT_DIR}/{path.name}"] = path.stat().st_size
    return made, expected


def _run_archiver(job: PackJob, work: _Workspace) -> None:
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", job.name]
    command += ["--version", job.version, "--handler", str(job.handler / ENTRY_FILE), "--extra-files", str(work.stage)]
    command += ["--config-file", str(work.config), "--archive-format", job.format]
    command += ["--export-path", str(work.export), "-f"]
    size = size_bytes(work.stage)
    slow = ", compressing takes a while" if job.format != "no-archive" and size > 1 << 28 else ""
    say(f"torch-model-archiver: {job.format}, {format_mib(size)}{slow} ...")
    # The archiver deletes $TMPDIR/<model-name> before it starts, so it gets an empty TMPDIR.
    env = {**os.environ, "TMPDIR": str(work.temp)}
    done = subprocess.run(command, env=env, cwd=work.temp, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PackError("torch-model-archiver failed", done.stderr.strip().splitlines()[-5:])


def _link(source: Path, target: Path) -> None:
    """Make a hard link while packing. Only the archiver reads it, and it is removed at the end."""
    try:
        os.link(source.resolve(), target)  # resolve: the hub's cache holds symbolic links
    except OSError:
        _clone(source, target)


def _clone(source: Path, target: Path) -> None:
    """Copy a file, sharing blocks if the file system can.

    Never a hard link: a later training run that writes the checkpoint in place would change the archive under a running
    server.
    """
    ficlone = 0x40049409  # linux/fs.h
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            import fcntl

            fcntl.ioctl(writer.fileno(), ficlone, reader.fileno())
        except (ImportError, OSError):
            shutil.copyfileobj(reader, writer, 16 << 20)


# --- verifying --------------------------------------------------------------------------------------------------------


def verify(archive: Path, archive_format: str, name: str, expected: dict[str, int]) -> None:
    """Check the manifest of an archive, and that it contains exactly the `expected` files in full size.

    Raise `PackError` with every difference.
    """
    found, manifest = read_archive(archive, archive_format)
    problems = [f"{file} is missing" for file in expected if file not in found]
    for file, size in expected.items():
        if file in found and found[file] != size:
            problems.append(f"{file} must be {size} bytes, got {found[file]}")
    problems += [f"{file} does not belong in the archive" for file in found if file not in expected]
    model = manifest.get("model", {})
    if model.get("modelName") != name or model.get("handler") != ENTRY_FILE or model.get("configFile") != CONFIG_FILE:
        problems.append(f"its manifest is wrong: {model}")
    if problems:
        raise PackError(f"the archive {archive.name} is not as it must be", problems)


def read_archive(archive: Path, archive_format: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the sizes of an archive's files by path, without the manifest, and the manifest."""
    if archive_format == "no-archive":
        sizes = {p.relative_to(archive).as_posix(): p.stat().st_size for p in archive.rglob("*") if p.is_file()}
        raw = (archive / MANIFEST).read_bytes()
    elif archive_format == "default":
        with zipfile.ZipFile(archive) as mar:
            sizes = {info.filename: info.file_size for info in mar.infolist() if not info.is_dir()}
            raw = mar.read(MANIFEST)
    else:
        with tarfile.open(archive) as tarball:
            root = archive.name.removesuffix(".tar.gz") + "/"
            sizes = {info.name.removeprefix(root): info.size for info in tarball if info.isfile()}
            member = tarball.extractfile(root + MANIFEST)
            raw = member.read() if member else b"{}"
    sizes.pop(MANIFEST)
    return sizes, json.loads(raw)


# --- the result -------------------------------------------------------------------------------------------------------


def _for_sagemaker(made: Path, archive_format: str) -> Path:
    """Return a folder to upload to S3 as it is: the files of the archive, or model.tar.gz with them at its top.

    The files are readable by every user, since the container runs as another user and cannot change them.
    """
    for path in [made, *made.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    if archive_format == "no-archive":
        return made
    folder = made.parent / "sagemaker"
    folder.mkdir()
    say(f"{SAGEMAKER_TARBALL}: {format_mib(size_bytes(made))}, compressing takes a while ...")
    with tarfile.open(folder / SAGEMAKER_TARBALL, "w:gz", compresslevel=1) as tarball:
        for path in sorted(made.rglob("*")):
            tarball.add(path, path.relative_to(made).as_posix(), recursive=False, filter=_owned_by_root)
    return folder


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove the user who packed, so that the same files make the same archive on every machine."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _swap_in(made: Path, job: PackJob) -> tuple[Path, ...]:
    """Make the new archive the current one. Return the archives of its name in other formats that were removed."""
    removed = [old for old in job.replaced if old != job.archive and old.exists()]
    versions.publish(made, job.archive, removed)
    for old in removed:
        say(f"removed {old.name}: two archives of one name are ambiguous")
    return tuple(removed)
