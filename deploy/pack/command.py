"""The command line of `build_mar.sh`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.options import Parser, version_line, whole_number

from .archive import CHECKPOINT_DIR, pack_model
from .errors import PackError, say
from .job import HANDLER_DIR, REPO, SUFFIXES, PackedModel, PackJob, format_mib
from .model_config import CONFIG_FILE

INTERRUPTED = 130


def parse_args(argv: Sequence[str] | None = None) -> PackJob:
    """Return the job that the command line describes."""
    parser = Parser(
        version=False,
        prog="build_mar.sh",
        description="Pack a LLaVA checkpoint and the handler into the model store. Replaces a model of the same name.",
        epilog="Example: ./build_mar.sh --model models/shapes --sessions 64",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_HUB_ID", help="a checkpoint folder, or an ID on the Hugging Face hub")
    add("--name", default="llava", help="model name in TorchServe (default: %(default)s)")
    formats = "a plain folder, a .mar, or a .tar.gz (default: %(default)s, which starts without unpacking)"
    add("--format", choices=list(SUFFIXES), default="no-archive", help=formats)
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of the weights when loaded")
    add("--device", choices=["auto", "cpu", "cuda"], help="device of the model")
    weights = "inside: in the archive; beside: the archive names the folder or hub ID (default: %(default)s)"
    add("--weights", choices=["inside", "beside"], default="inside", help=weights)
    add("--sessions", type=whole_number(1), metavar="N", help="maximum number of open sessions")
    config = "configuration to start from (default: handler/model-config.yaml); values without an option here are kept"
    add("--config", type=Path, default=HANDLER_DIR / CONFIG_FILE, metavar="FILE", help=config)
    add("--output", type=Path, default=REPO / "model_store", metavar="DIR", help="model store (default: model_store)")
    add("--model-version", dest="version", default="1.0", metavar="VERSION", help="of the model (default: %(default)s)")
    version = "print the version of LLaVA Sessions and exit; with a value, an older name of --model-version"
    add("--version", action=_Version, nargs="?", default=argparse.SUPPRESS, help=version)
    sagemaker = "pack for a SageMaker endpoint, into DIR/NAME.sagemaker, which is uploaded to S3 as it is. With "
    sagemaker += "--format no-archive for S3DataType S3Prefix and CompressionType None; with tgz a model.tar.gz"
    add("--sagemaker", action="store_true", help=sagemaker)
    return PackJob(**vars(parser.parse_args(argv)))


class _Version(argparse.Action):
    """`--version` prints the project's version; `--version VALUE` sets the model's, as in earlier versions."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _option: str | None = None
    ) -> None:
        if values is None:
            print(version_line())
            parser.exit()
        namespace.version = values


def main(argv: Sequence[str] | None = None) -> int:
    """Pack a model. Return the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    job = parse_args(argv)
    try:
        packed = pack_model(job)
    except (PackError, OSError) as err:  # OSError: a full or read-only disk
        say(f"error: {err}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; the model store is unchanged")
        return INTERRUPTED
    weights = "inside" if packed.checkpoint == CHECKPOINT_DIR else packed.checkpoint
    size = format_mib(packed.size_bytes)
    print(f"{_short(packed.archive)}  {size}  up to {packed.sessions} sessions  weights: {weights}")
    for line in next_steps(packed, job):
        print(line)
    return 0


def next_steps(packed: PackedModel, job: PackJob) -> list[str]:
    """Return the commands that upload or serve a packed model, as typed at the top of the checkout."""
    bin_dir = Path(sys.executable).parent
    if job.sagemaker:
        return ["Upload it to S3:", f"  {_short(bin_dir / 'llava-deploy')} upload {_short(packed.archive)}"]
    python = _short(Path(sys.executable))
    store = _short(job.output)
    torchserve = _short(bin_dir / "torchserve") if (bin_dir / "torchserve").is_file() else "torchserve"
    models = job.name if job.format == "no-archive" else f"{job.name}={packed.archive.name}"
    config = _short(REPO / "config.properties")
    log_config = _short(REPO / "deploy/serve/log4j2.xml")
    return [
        "Serve it, from the top of the checkout:",
        f"  {python} -m deploy.serve --model-store {store} --name {job.name}",
        "or without the launcher:",
        f"  . {_short(REPO / 'deploy/serve/local.env')}",
        f"  {torchserve} --start --foreground --ncs --ts-config {config} \\",
        f"    --log-config {log_config} --model-store {store} --models {models}",
    ]


def _short(path: Path) -> str:
    """Return a path relative to the working directory if it is below it, else absolute."""
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path.absolute())
