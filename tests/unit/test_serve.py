"""Parts of the launcher that need no server: Java's heap, CORS origins, and when a lost engine keeps sessions away."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from deploy.local_endpoint import contract
from deploy.serve.configuration import CONFIG, MANIFEST, cors_origins, model_version, read_properties
from deploy.serve.engine_watch import FORGET_S, HOLD_S, EngineWatch
from deploy.serve.haproxy import BODY_LIMIT, CONFIGS
from deploy.serve.java import MAX_HEAP_MIB, MIN_HEAP_MIB, heap_options, light_options
from deploy.serve.processes import ServeError
from deploy.serve.service import Service
from llava_sessions.config import MAX_REQUEST_BYTES
from llava_sessions.protocol import constants


@pytest.mark.parametrize(
    ("limit", "heap_mib"),
    [(str(1 << 30), MIN_HEAP_MIB), (str(8 << 30), 1024), (str(1 << 50), None), ("max\n", None), (None, None)],
)
def test_the_heap_of_java_follows_the_memory_of_the_container(
    tmp_path: Path, limit: str | None, heap_mib: int | None
) -> None:
    path = tmp_path / "memory.max"
    if limit is not None:
        path.write_text(limit)
    (heap,) = [int(found[1]) for option in heap_options([path]) if (found := re.fullmatch(r"-Xmx(\d+)m", option))]
    if heap_mib is None:
        assert heap == int(re.search(r"-Xmx(\d+)m", " ".join(heap_options([])))[1]), "as without a container"
        assert MIN_HEAP_MIB <= heap <= MAX_HEAP_MIB
    else:
        assert heap <= heap_mib
        assert heap in (heap_mib, int(re.search(r"-Xmx(\d+)m", " ".join(heap_options([])))[1]))


def test_an_operators_collector_replaces_ours() -> None:
    assert "-XX:+UseSerialGC" in light_options(["-Xmx1g"])
    assert not [option for option in light_options(["-XX:+UseG1GC"]) if option.endswith("GC")], "Java takes only one"


def test_origins_are_a_list_of_origins() -> None:
    assert cors_origins({}) == cors_origins({"CORS_ORIGINS": " "}) == []
    given = "https://a.example http://localhost:3000 *"
    assert cors_origins({"CORS_ORIGINS": given}) == given.split()
    for wrong in ("a.example", "https://a/b", 'http://a" }', "ftp://a"):
        with pytest.raises(ServeError, match="CORS_ORIGINS must be"):
            cors_origins({"CORS_ORIGINS": wrong})


def test_a_lost_engine_keeps_new_sessions_away_until_it_is_back() -> None:
    watch = EngineWatch()
    assert not watch.observe(False, 1000.0)
    assert watch.observe(True, 1001.0)
    assert watch.is_avoided
    assert watch.observe(False, 1005.0)
    assert not watch.is_avoided, "after one loss in a while the engine serves at once"


def test_an_engine_that_flaps_gets_no_new_sessions_for_longer_each_time() -> None:
    watch = EngineWatch()
    now_s = 1000.0
    for hold_s in (*HOLD_S, HOLD_S[-1]):
        watch.observe(True, now_s)
        watch.observe(False, now_s + 1)
        assert watch.is_avoided == (hold_s > 0)
        watch.observe(False, now_s + 1 + hold_s)
        assert not watch.is_avoided
        now_s += 1 + hold_s + 1
    watch.observe(True, now_s + FORGET_S + 1)
    watch.observe(False, now_s + FORGET_S + 2)
    assert not watch.is_avoided, "the losses of long ago are forgotten"


def test_all_files_have_the_same_limit_of_a_request() -> None:
    rules = CONFIGS[0].read_text()
    assert f"req.body_size gt {MAX_REQUEST_BYTES} }}" in rules
    assert f"LIMIT = {MAX_REQUEST_BYTES} " in BODY_LIMIT.read_text()
    buffer_bytes = int(re.search(r"tune.bufsize (\d+)", rules)[1])
    assert int(read_properties(CONFIG)["max_request_size"]) == MAX_REQUEST_BYTES + 4 * buffer_bytes


@pytest.mark.parametrize("kind", ["folder", "mar", "tgz"])
def test_the_version_of_a_model_is_read_from_its_archive(tmp_path: Path, kind: str) -> None:
    manifest = tmp_path / "llava" / MANIFEST
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"model": {"modelName": "llava", "modelVersion": "2.7"}}')
    archive = tmp_path / "llava"
    if kind == "mar":
        archive = tmp_path / "llava.mar"
        with zipfile.ZipFile(archive, "w") as mar:
            mar.write(manifest, MANIFEST)
    elif kind == "tgz":
        archive = tmp_path / "llava.tar.gz"
        with tarfile.open(archive, "w:gz") as tarball:
            tarball.add(manifest, f"llava/{MANIFEST}")
    assert model_version(archive) == "2.7"


def test_an_archive_without_a_version_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="no readable MAR-INF"):
        model_version(tmp_path)


def test_the_fronts_and_the_worker_name_the_content_type_in_one_header() -> None:
    assert contract.CONTENT_TYPE_HEADER == constants.CONTENT_TYPE_HEADER
    assert f"set-header {constants.CONTENT_TYPE_HEADER.lower()} " in CONFIGS[0].read_text()


def test_a_home_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for home, reason in ((tmp_path / ("deep" * 30), "too long for unix sockets"), (tmp_path / "file" / "x", "Not a")):
        assert Service(tmp_path, haproxy=None, home=home).run() == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --home: ")
        assert reason in line
