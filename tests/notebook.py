"""`make notebook`: execute docs/notebook.ipynb on this machine and store the result under .cache/, or in it (--save).

SageMaker is two TorchServes behind the local endpoint; the rest of AWS is moto, with an image in its ECR.
tests/deploy/test_notebook.py executes the notebook in the same way and checks its outputs.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import boto3
import nbformat
import papermill
from nbformat import NotebookNode

from deploy.options import Parser
from deploy.sagemaker import images
from deploy.serve.torchserve import TorchServe
from tests.support import cloud
from tests.support.local_endpoint import Endpoint
from tests.support.serving import START_S, pack, running

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
OUTPUT = ROOT / ".cache" / "notebook.ipynb"
REPOSITORY = "llava-sessions"
# Text that differs at each execution, and its replacement.
PASSING = {
    r"\b\d\d:\d\d:\d\d(?= [A-Z_]+ )": "HH:MM:SS",
    r"(?<=open until )\S+": "YYYY-MM-DDTHH:MM:SSZ",
    r"(?<=-)(?=\d*[A-Z])[A-Z0-9]{12}\b": "XXXXXXXXXXXX",  # CloudFormation's end of an alarm's name
    r"(?<=/models/)[0-9a-f]{16}\b": "CHECKSUM",  # of the packed model, which holds the time when it was packed
}


@contextmanager
def rehearsal(servers: list[TorchServe], home: Path) -> Iterator[dict[str, str]]:
    """Run everything that the notebook needs except an account. Yield its parameters, the addresses.

    The environment of this process is changed: moto calls itself with it, and kernels inherit it.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    home.mkdir()
    with Endpoint(servers) as endpoint, cloud.serving() as url:
        cloud.empty(url)
        with mock.patch.dict(os.environ, kept | cloud.settings(url, home), clear=True):
            session = boto3.Session(region_name=cloud.REGION)
            images.ensure_repository(images.Account("llava", session), REPOSITORY)
            cloud.put_image(session.client("ecr"), REPOSITORY)
            yield {"runtime_url": endpoint.url, "account_url": url}


def execute(folder: Path, **parameters: str) -> NotebookNode:
    """Execute the notebook with papermill and return it. Its files go to `folder`.

    Raise `PapermillExecutionError` with the first cell that fails.
    """
    parameters["store"] = str(folder / "store")
    done = papermill.execute_notebook(
        NOTEBOOK,
        folder / "executed.ipynb",
        parameters,
        cwd=ROOT,
        progress_bar=False,
        start_timeout=START_S,
        execution_timeout=START_S,
    )
    return tidied(done, parameters["store"])


def tidied(done: NotebookNode, store: str) -> NotebookNode:
    """Return the notebook with the outputs of an executed one, without traces of papermill, machine and time."""
    outputs = {cell.id: cell.outputs for cell in done.cells if cell.cell_type == "code"}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = number
        cell.outputs = []
        for output in copy.deepcopy(outputs[cell.id]):
            if "execution_count" in output:
                output.execution_count = number
            before = cell.outputs[-1] if cell.outputs else {}
            if output.output_type == "stream" and before.get("name") == output.name:
                before.text += output.text  # the number of pieces differs from run to run
            else:
                cell.outputs.append(output)
        for output in cell.outputs:
            if "text" in output:
                output.text = _lasting(output.text, store)
    return notebook


def _lasting(text: str, store: str) -> str:
    text = text.replace(store, "model_store").replace(f"{ROOT}/", "")
    for pattern, words in PASSING.items():
        text = re.sub(pattern, words, text)
    return text


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options. `output` is the notebook with the outputs."""
    about = "Execute docs/notebook.ipynb on this machine. SageMaker is two local instances; the rest of AWS is moto."
    parser = Parser(prog="python -m tests.notebook", description=about)
    output = "notebook with the outputs (default: .cache/notebook.ipynb, which git ignores)"
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=output)
    parser.add_argument("--save", dest="output", action="store_const", const=NOTEBOOK, help="write docs/notebook.ipynb")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Execute the notebook. Return the exit code."""
    args = parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the instances share the cores: a waiting thread must not spin
    with tempfile.TemporaryDirectory(prefix="llava-notebook-") as name:
        folder = Path(name)
        print("packing models/shapes and starting two TorchServes ...", flush=True)
        store = pack(folder / "served")
        with running(TorchServe(store), TorchServe(store)) as servers, rehearsal(servers, folder / "home") as where:
            print("executing docs/notebook.ipynb ...", flush=True)
            done = execute(folder, **where)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(done, args.output)
    print(f"its outputs are in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
