"""The build kit: a LLaVA checkpoint and the handler -> one archive in the model store.

Owns: what a servable checkpoint looks like on disk, which of its files travel, and how the archive's configuration is
rendered. Must not know: how the handler works inside (it packs the folder handler/ as it is) and how a server is run
(deploy/serve/service.py). Imports neither torch nor transformers, so `--help` and a refusal come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import yaml

REPO = Path(__file__).resolve().parents[2]
HANDLER_DIR = REPO / "handler"
ENTRY_FILE = "llava_handler.py"
PACKAGE_DIR = "llava_sessions"
CONFIG_FILE = "model-config.yaml"
CHECKPOINT_DIR = "checkpoint"

SUFFIXES = {"no-archive": "", "default": ".mar", "tgz": ".tar.gz"}
# SageMaker unpacks what it is given into /opt/ml/model, and that folder is then the archive: no folder around it. The
# dot keeps the result apart from every --name.
SAGEMAKER_SUFFIX = ".sagemaker"
SAGEMAKER_TARBALL = "model.tar.gz"
FAMILIES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.json",
    "merges.txt",
)
GIT_LFS_MAGIC = b"version https://git-lfs"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class PackError(Exception):
    """What stops the packing: every problem that was found, in words for the person who asked for it."""

    def __init__(self, headline: str, problems: Iterable[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n  - ".join([headline, *self.problems]))


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout holds the result alone."""
    print(text, file=sys.stderr, flush=True)


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def checkpoint_problems(folder: Path) -> list[str]:
    """All that keeps `folder` from being served; empty when it is a complete LLaVA checkpoint."""
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    problems = _config_problems(folder) + _processor_problems(folder) + _weight_problems(folder)
    pointers = [path.name for path in checkpoint_files(folder) if _is_pointer(path)]
    return problems + [f"{name} is a git-lfs pointer, not the file itself (run: git lfs pull)" for name in pointers]


def _read_json(path: Path) -> dict | str:
    """The object in a JSON file, or what is wrong with it."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as err:
        return f"{path.name} cannot be read: {err.strerror}"
    except ValueError as err:
        return f"{path.name} is not JSON: {err}"
    return content if isinstance(content, dict) else f"{path.name} holds no JSON object"


def _config_problems(folder: Path) -> list[str]:
    if not (folder / "config.json").is_file():
        return ["config.json is missing"]
    config = _read_json(folder / "config.json")
    if isinstance(config, str):
        return [] if _is_pointer(folder / "config.json") else [config]
    problems = []
    kind, classes = config.get("model_type"), config.get("architectures") or []
    if kind not in FAMILIES:
        problems.append(f"config.json: model_type is {kind!r}, wanted one of {sorted(FAMILIES)}")
    elif classes and FAMILIES[kind] not in classes:
        problems.append(f"config.json: architectures is {classes}, wanted {FAMILIES[kind]!r}")
    return problems


def _processor_problems(folder: Path) -> list[str]:
    """Picture processor, tokenizer and chat template; transformers has kept each under several names."""
    parts: dict[str, dict] = {}
    problems = []
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / name
        content = _read_json(path) if path.is_file() else {}
        if isinstance(content, str):
            problems += [] if _is_pointer(path) else [content]
            content = {}
        parts[name] = content

    if not (folder / "preprocessor_config.json").is_file() and "image_processor" not in parts["processor_config.json"]:
        problems.append("no picture processor: preprocessor_config.json, or image_processor in processor_config.json")
    if not _has_any(folder, "tokenizer.json", "tokenizer.model") and not (
        _has_any(folder, "vocab.json") and _has_any(folder, "merges.txt")
    ):
        problems.append("no tokenizer: tokenizer.json, tokenizer.model, or vocab.json with merges.txt")
    if not _has_any(folder, "chat_template.jinja", "chat_template.json") and not any(
        part.get("chat_template") for part in parts.values()
    ):
        problems.append("no chat template: chat_template.jinja, chat_template.json, or a key of tokenizer_config.json")
    return problems


def _has_any(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


def _weight_problems(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return _header_problems(folder / WEIGHTS, set())
    if (folder / WEIGHTS_INDEX).is_file():
        return _shard_problems(folder)
    others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pt") for path in folder.glob(pattern))
    seen = f" (found {', '.join(others[:4])}, which it does not use)" if others else ""
    return [f"no weights: {WEIGHTS}, or {WEIGHTS_INDEX} and its shards{seen}"]


def _shard_problems(folder: Path) -> list[str]:
    index = _read_json(folder / WEIGHTS_INDEX)
    if isinstance(index, str):
        return [] if _is_pointer(folder / WEIGHTS_INDEX) else [index]
    tensors_of = _tensors_by_shard(index)
    if not tensors_of:
        return [f"{WEIGHTS_INDEX} names no shards"]
    problems = []
    for shard, tensors in sorted(tensors_of.items()):
        if PurePosixPath(shard).name != shard:
            problems.append(f"{WEIGHTS_INDEX} names {shard!r}, which is not a file of this folder")
        elif not (folder / shard).is_file():
            problems.append(f"{shard} is missing, though {WEIGHTS_INDEX} names it")
        else:
            problems += _header_problems(folder / shard, tensors)
    return problems


def _tensors_by_shard(index: dict) -> dict[str, set[str]]:
    tensors_of: dict[str, set[str]] = {}
    weight_map = index.get("weight_map")
    for tensor, shard in (weight_map if isinstance(weight_map, dict) else {}).items():
        tensors_of.setdefault(str(shard), set()).add(tensor)
    return tensors_of


def _header_problems(path: Path, wanted: set[str]) -> list[str]:
    """Whether a safetensors file is whole: 8 bytes of header length, the JSON header, then the data it names."""
    if _is_pointer(path):
        return []
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return [f"{path.name} is no safetensors file, or cut short ({size} bytes)"]
        try:
            header = json.loads(file.read(length))
            names = set(header) - {"__metadata__"}
            end = max((header[name]["data_offsets"][1] for name in names), default=0)
        except (ValueError, KeyError, TypeError, IndexError) as err:
            return [f"{path.name} has an unreadable safetensors header: {type(err).__name__}: {err}"]
    if not names:
        return [f"{path.name} holds no tensors"]
    if size != 8 + length + end:
        return [f"{path.name} is {size} bytes, its header says {8 + length + end}: cut short or damaged"]
    if missing := sorted(wanted - names):
        return [f"{path.name} lacks {len(missing)} tensors of the index, {missing[0]} first"]
    return []


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(GIT_LFS_MAGIC)) == GIT_LFS_MAGIC


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that travel: never a training script, a model card or weights in another format."""
    small = [path for path in folder.iterdir() if any(fnmatch.fnmatch(path.name, pattern) for pattern in SMALL_FILES)]
    return sorted(path for path in [*small, *weight_files(folder)] if path.is_file())


def weight_files(folder: Path) -> list[Path]:
    """The weights that transformers would load: the single file where there is one, else the index and its shards."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        return []
    index = _read_json(folder / WEIGHTS_INDEX)
    shards = [] if isinstance(index, str) else sorted(_tensors_by_shard(index))
    return [folder / WEIGHTS_INDEX, *(folder / shard for shard in shards if PurePosixPath(shard).name == shard)]


def download(hub_id: str) -> Path:
    """The hub's checkpoint in the local cache, fetched where it is not there yet (with progress bars)."""
    from huggingface_hub import snapshot_download  # imported here: it takes half a second, and few runs need it

    say(f"fetching {hub_id} from the hub, or from its cache ...")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*SMALL_FILES, "*.safetensors", WEIGHTS_INDEX]))
    except Exception as err:  # offline, gated, misspelt, disk full: the hub's client raises many kinds
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise PackError(
            f"{hub_id} is neither a folder here nor a checkpoint that could be fetched from the hub",
            [reason, "offline? download it elsewhere, and give --model the folder"],
        ) from err


# --- the configuration ------------------------------------------------------------------------------------------------


def render_config(template: str, llava: dict[str, object], sessions: int | None) -> tuple[str, int]:
    """model-config.yaml with our values, its comments kept; and how many sessions it allows.

    TorchServe blocks one thread per idle sequence and stalls where none is left, so batchSize and maxNumSequence get
    twice the sessions (a closed one lingers in the frontend until it idles out) and some room for refused requests.
    """
    config = _parse_config(template)
    if sessions is None:
        sessions = config["llava"].get("max_sessions")
        if not isinstance(sessions, int) or isinstance(sessions, bool) or sessions < 1:
            raise PackError(f"{CONFIG_FILE}: llava.max_sessions is {sessions!r}, wanted a whole number from 1 up")
    rows = 2 * sessions + 16
    top: dict[str, object] = {"batchSize": rows, "maxNumSequence": rows}
    nested = {**llava, "max_sessions": sessions}

    missing = [key for key in top if key not in config]
    missing += [f"llava.{key}" for key in nested if key not in config["llava"]]
    if missing:
        raise PackError(f"{CONFIG_FILE} lacks what packing sets", missing)

    text = template
    for key, value in top.items():
        text = _replace_value(text, key, value, indented=False)
    for key, value in nested.items():
        text = _replace_value(text, key, value, indented=True)
    if _parse_config(text) != {**config, **top, "llava": {**config["llava"], **nested}}:
        raise PackError(f"{CONFIG_FILE} is written in a way that packing cannot edit: one `key: value` a line, please")
    return text, sessions


def _parse_config(text: str) -> dict:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise PackError(f"{CONFIG_FILE} is not YAML: {err}") from err
    if not isinstance(config, dict) or not isinstance(config.get("llava"), dict):
        raise PackError(f"{CONFIG_FILE} has no `llava:` section")
    return config


def _replace_value(text: str, key: str, value: object, *, indented: bool) -> str:
    """One `key: value` line changed, at the top level or one level under `llava:`; the comment behind it stays."""
    lines = text.split("\n")
    line_of_key = re.compile(rf"^({'[ ]+' if indented else ''}{re.escape(key)}:[ ]*)([^#\n]*?)([ ]+#.*)?[ ]*$")
    inside = not indented
    for number, line in enumerate(lines):
        if indented and re.match(r"^\S", line) and not line.startswith("#"):
            inside = line.startswith("llava:")
        if inside and (match := line_of_key.match(line)):
            lines[number] = f"{match[1].rstrip()} {_scalar(value)}{match[3] or ''}"
            break
    return "\n".join(lines)


def _scalar(value: object) -> str:
    """As YAML: a string plain where that means the same, else quoted."""
    text = str(value)
    plain = isinstance(value, str) and not re.search(r"[\s#:\"']", text) and yaml.safe_load(text) == value
    return text if plain else json.dumps(value)


# --- the archive ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One packing: what the command line asked for."""

    model: str
    name: str = "llava"
    format: str = "no-archive"
    dtype: str | None = None
    device: str | None = None
    weights: str = "inside"
    sessions: int | None = None
    config: Path = HANDLER_DIR / CONFIG_FILE
    output: Path = REPO / "model_store"
    version: str = "1.0"
    sagemaker: bool = False

    @property
    def archive(self) -> Path:
        return self.output / (self.name + (SAGEMAKER_SUFFIX if self.sagemaker else SUFFIXES[self.format]))

    @property
    def rivals(self) -> list[Path]:
        """Archives that would be taken for this one: of the same name, for the same server, in any format."""
        if self.sagemaker:
            return [self.archive]
        return [self.output / (self.name + suffix) for suffix in SUFFIXES.values()]


@dataclass(frozen=True)
class Packed:
    """What lies in the model store after a packing."""

    archive: Path
    size_bytes: int
    sessions: int
    checkpoint: str
    removed: tuple[Path, ...]


def pack(job: Job) -> Packed:
    """Check, stage, archive, verify; then swap the new archive in, so that a failed run leaves the old one alone."""
    if not MODEL_NAME.fullmatch(job.name):
        raise PackError(f"--name {job.name!r}: letters, digits, - and _ only, a letter or digit first")
    if job.sagemaker:
        _check_sagemaker(job)
    _check_handler()
    folder = resolve_checkpoint(job.model, job.weights)
    inside = folder if job.weights == "inside" else None
    checkpoint = CHECKPOINT_DIR if inside else str(folder or job.model)
    llava = {"checkpoint": checkpoint, "dtype": job.dtype, "device": job.device}
    config_text, sessions = render_config(
        _read_text(job.config), {key: value for key, value in llava.items() if value is not None}, job.sessions
    )

    job.output.mkdir(parents=True, exist_ok=True)
    # Beside the result, not in /tmp: one file system, so links and the last rename work and no memory disk fills up.
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=job.output) as scratch:
        plain = replace(job, format="no-archive") if job.sagemaker else job
        made, expected = _build(plain, Path(scratch).resolve(), inside, config_text)
        verify(made, plain.format, job.name, expected)
        if job.sagemaker:
            made = _for_sagemaker(made, job.format)
        removed = _swap_in(made, job)
    return Packed(job.archive, _size_bytes(job.archive), sessions, checkpoint, removed)


def resolve_checkpoint(model: str, weights: str) -> Path | None:
    """The checked folder that `model` means; None for a hub id that the server is to load by itself."""
    path = Path(model).expanduser()
    if path.exists() or not HUB_ID.fullmatch(model):
        folder = path.resolve()
    elif weights == "beside":
        say(f"{model} is no folder here: taken for a hub id, which the server loads when it starts")
        return None
    else:
        folder = download(model)
    say(f"checking {folder} ...")
    if problems := checkpoint_problems(folder):
        raise PackError(f"{model} is not a checkpoint that can be served", problems)
    return folder


def _check_sagemaker(job: Job) -> None:
    """An endpoint has nothing but what it is given: no .mar is unpacked there, and no weights are fetched at start."""
    if job.weights != "inside":
        raise PackError("--sagemaker needs the weights inside: an endpoint sees no folder of this machine")
    if job.format == "default":
        raise PackError("--sagemaker takes --format no-archive (a folder for S3) or tgz (model.tar.gz), not default")


def _check_handler() -> None:
    missing = [name for name in (ENTRY_FILE, PACKAGE_DIR) if not (HANDLER_DIR / name).exists()]
    if missing:
        raise PackError(f"{HANDLER_DIR} is incomplete", [f"{name} is missing" for name in missing])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as err:
        raise PackError(f"--config {path} cannot be read: {err.strerror}") from err


def _build(job: Job, scratch: Path, checkpoint: Path | None, config_text: str) -> tuple[Path, dict[str, int]]:
    """Run the archiver over a staged folder. Returns the archive, and each file that must be in it with its size."""
    stage, export, temp = (scratch / name for name in ("stage", "export", "tmp"))
    for folder in (stage, export, temp):
        folder.mkdir()
    config = scratch / CONFIG_FILE
    config.write_text(config_text, encoding="utf-8")
    expected = {ENTRY_FILE: (HANDLER_DIR / ENTRY_FILE).stat().st_size, CONFIG_FILE: config.stat().st_size}
    shutil.copytree(
        HANDLER_DIR / PACKAGE_DIR, stage / PACKAGE_DIR, ignore=shutil.ignore_patterns("__pycache__", ".*", "*.pyc")
    )
    files = checkpoint_files(checkpoint) if checkpoint else []
    # The archiver copies everything twice. For a plain folder the weights can be spared that: they go there after it.
    late = weight_files(checkpoint) if checkpoint and job.format == "no-archive" else []
    if checkpoint:
        (stage / CHECKPOINT_DIR).mkdir()
        for path in files:
            if path not in late:
                _link(path, stage / CHECKPOINT_DIR / path.name)
    expected |= {p.relative_to(stage).as_posix(): p.stat().st_size for p in stage.rglob("*") if p.is_file()}

    _run_archiver(job, stage, export, temp, config)
    made = export / (job.name + SUFFIXES[job.format])
    for path in late:
        say(f"copying {path.name}, {_mib(path.stat().st_size)} ...")
        clone(path, made / CHECKPOINT_DIR / path.name)
        expected[f"{CHECKPOINT_DIR}/{path.name}"] = path.stat().st_size
    return made, expected


def _link(source: Path, target: Path) -> None:
    """A hard link while we pack: nothing but the archiver reads it, and it is gone afterwards."""
    try:
        os.link(source.resolve(), target)  # resolve: the hub's cache holds symbolic links
    except OSError:
        clone(source, target)


def clone(source: Path, target: Path) -> None:
    """A copy of its own, sharing blocks where the file system can. Never a hard link: a later training run that writes
    the checkpoint in place would change the archive under a running server."""
    ficlone = 0x40049409  # linux/fs.h
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            import fcntl

            fcntl.ioctl(writer.fileno(), ficlone, reader.fileno())
        except (ImportError, OSError):
            shutil.copyfileobj(reader, writer, 16 << 20)


def _run_archiver(job: Job, stage: Path, export: Path, temp: Path, config: Path) -> None:
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", job.name]
    command += ["--version", job.version, "--handler", str(HANDLER_DIR / ENTRY_FILE), "--extra-files", str(stage)]
    command += ["--config-file", str(config), "--archive-format", job.format, "--export-path", str(export), "-f"]
    size = _size_bytes(stage)
    slow = ", compressing takes a while" if job.format != "no-archive" and size > 1 << 28 else ""
    say(f"torch-model-archiver: {job.format}, {_mib(size)}{slow} ...")
    # The archiver deletes $TMPDIR/<model-name> before it starts, whatever that is: it gets a TMPDIR of its own.
    done = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(temp)}, cwd=temp, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PackError("torch-model-archiver failed", done.stderr.strip().splitlines()[-5:])


def verify(archive: Path, kind: str, name: str, expected: dict[str, int]) -> None:
    """The archive holds a manifest for this name and entry file, and every expected file in full size, nothing else."""
    found, manifest = read_archive(archive, kind)
    problems = [f"{file} is missing" for file in expected if file not in found]
    sizes = [(file, found[file], size) for file, size in expected.items() if file in found]
    problems += [f"{file}: {got} bytes, wanted {wanted}" for file, got, wanted in sizes if got != wanted]
    problems += [f"{file} does not belong there" for file in found if file not in expected]
    model = manifest.get("model", {})
    if model.get("modelName") != name or model.get("handler") != ENTRY_FILE or model.get("configFile") != CONFIG_FILE:
        problems.append(f"its manifest says {model}")
    if problems:
        raise PackError(f"the archive {archive.name} did not come out right", problems)


def read_archive(archive: Path, kind: str) -> tuple[dict[str, int], dict]:
    """Sizes of an archive's files by path, less the manifest, and the manifest."""
    manifest_path = "MAR-INF/MANIFEST.json"
    if kind == "no-archive":
        sizes = {p.relative_to(archive).as_posix(): p.stat().st_size for p in archive.rglob("*") if p.is_file()}
        raw = (archive / manifest_path).read_bytes()
    elif kind == "default":
        with zipfile.ZipFile(archive) as opened:
            sizes = {info.filename: info.file_size for info in opened.infolist() if not info.is_dir()}
            raw = opened.read(manifest_path)
    else:
        with tarfile.open(archive) as opened:
            root = archive.name.removesuffix(".tar.gz") + "/"
            sizes = {info.name.removeprefix(root): info.size for info in opened if info.isfile()}
            member = opened.extractfile(root + manifest_path)
            raw = member.read() if member else b"{}"
    sizes.pop(manifest_path)
    return sizes, json.loads(raw)


def _for_sagemaker(made: Path, kind: str) -> Path:
    """The folder whose content goes to S3 as it is: the archive's own files, or model.tar.gz with them at its top.

    Everyone may read them: on the endpoint they belong to another user, and nothing can be changed there.
    """
    for path in [made, *made.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    if kind == "no-archive":
        return made
    folder = made.parent / "sagemaker"
    folder.mkdir()
    say(f"{SAGEMAKER_TARBALL}: {_mib(_size_bytes(made))}, compressing takes a while ...")
    with tarfile.open(folder / SAGEMAKER_TARBALL, "w:gz", compresslevel=1) as tarball:
        for path in sorted(made.rglob("*")):
            tarball.add(path, path.relative_to(made).as_posix(), recursive=False, filter=_owned_by_root)
    return folder


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of who packed it travels, so that the same files make the same archive on every machine."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _swap_in(made: Path, job: Job) -> tuple[Path, ...]:
    """Put the new archive in place. Those of the same name in another format go: TorchServe would serve either."""
    removed = []
    for number, old in enumerate(job.rivals):
        if not old.exists():
            continue
        aside = made.parent.parent / f"old-{number}"
        old.rename(aside)  # out of the way first: a folder is removed slowly, a rename is at once
        if old != job.archive:
            removed.append(old)
            say(f"removed {old.name}: two archives of one name would be confused")
    made.rename(job.archive)
    return tuple(removed)


def _size_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


# --- the command line -------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> Job:
    parser = argparse.ArgumentParser(
        prog="build_mar.sh",
        description="Pack a LLaVA checkpoint and the handler into the model store, in place of one of the same name.",
        epilog="Example: ./build_mar.sh --model models/shapes --sessions 64",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_HUB_ID", help="a checkpoint folder, or an id on the Hugging Face hub")
    add("--name", default="llava", help="name in TorchServe (default: %(default)s)")
    formats = "a plain folder, a .mar, or a .tar.gz (default: %(default)s, which starts without unpacking)"
    add("--format", choices=list(SUFFIXES), default="no-archive", help=formats)
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of the weights when loaded")
    add("--device", choices=["auto", "cpu", "cuda"], help="where the model runs")
    weights = "inside: the archive holds the checkpoint; beside: it names the folder or hub id (default: %(default)s)"
    add("--weights", choices=["inside", "beside"], default="inside", help=weights)
    add("--sessions", type=_positive, metavar="N", help="open sessions at most")
    config = "the configuration to start from (default: handler/model-config.yaml); what is not given here stays"
    add("--config", type=Path, default=HANDLER_DIR / CONFIG_FILE, metavar="FILE", help=config)
    add("--output", type=Path, default=REPO / "model_store", metavar="DIR", help="model store (default: model_store)")
    add("--version", default="1.0", help="model version (default: %(default)s)")
    sagemaker = "for a SageMaker endpoint, in DIR/NAME.sagemaker: what lies in it goes to S3 as it is. With --format "
    sagemaker += "no-archive for S3DataType S3Prefix and CompressionType None; with tgz a model.tar.gz"
    add("--sagemaker", action="store_true", help=sagemaker)
    return Job(**vars(parser.parse_args(argv)))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: wanted 1 or more")
    return value


def serve_lines(packed: Packed, job: Job) -> list[str]:
    """How to serve what was packed, as typed at the top of the checkout."""
    models = job.name if job.format == "no-archive" else f"{job.name}={packed.archive.name}"
    torchserve = Path(sys.executable).parent / "torchserve"
    command = _short(torchserve) if torchserve.is_file() else "torchserve"
    return [
        f". {_short(REPO / 'deploy/serve/local.env')}",
        f"{command} --start --foreground --ncs --ts-config {_short(REPO / 'config.properties')} \\",
        f"  --log-config {_short(REPO / 'deploy/serve/log4j2.xml')} \\",
        f"  --model-store {_short(job.output)} --models {models}",
    ]


def _short(path: Path) -> str:
    """Relative to where the command was typed, if it is under there."""
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path.absolute())


def main(argv: Sequence[str] | None = None) -> int:
    job = parse_args(argv)
    try:
        packed = pack(job)
    except PackError as err:
        say(f"error: {err}")
        return 2
    except OSError as err:  # a full or read-only disk
        say(f"error: {err}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; the model store is as it was")
        return 130
    weights = "inside" if packed.checkpoint == CHECKPOINT_DIR else packed.checkpoint
    print(f"{_short(packed.archive)}  {_mib(packed.size_bytes)}  up to {packed.sessions} sessions  weights: {weights}")
    if job.sagemaker:
        command = _short(Path(sys.executable).parent / "llava-deploy")
        print(f"Send it to S3:\n  {command} upload {_short(packed.archive)}")
        return 0
    print("Serve it, from the top of the checkout:")
    print(f"  {_short(Path(sys.executable))} -m deploy.serve --model-store {_short(job.output)} --name {job.name}")
    print("or by hand:")
    for line in serve_lines(packed, job):
        print("  " + line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
