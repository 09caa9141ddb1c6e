"""Models in S3: what `build_mar.sh --sagemaker` made, sent in parallel parts, each with its checksum.

A model lies under its own content's checksum, so an upload never changes one that an endpoint reads, what is there
already is not sent again, and the parts of an interrupted upload can only be parts of the same file: the next one goes
on in its middle. S3 gets the SHA-256 of each part, and refuses one that arrived as anything else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from botocore.config import Config
from botocore.exceptions import ClientError
from tqdm import tqdm

from .account import MADE_BY, Account
from .problems import DeployError, code_of

PART_BYTES = 16 << 20
MAX_PARTS = 10_000  # S3's limit
THREADS = 8
MANIFEST = "MAR-INF/MANIFEST.json"
CONFIG = "model-config.yaml"
TARBALL = "model.tar.gz"
SHA256 = {"ChecksumAlgorithm": "SHA256"}
CURRENT = "current.json"


@dataclass(frozen=True)
class File:
    """One file on its way: the SHA-256 of each of its parts, and of the whole as S3 reckons it."""

    path: Path
    name: str
    size: int
    part_bytes: int
    parts: tuple[bytes, ...]

    @property
    def checksum(self) -> str:
        """S3's own: of the bytes, or of the parts' checksums (where S3 puts a hyphen and their number behind it)."""
        return _base64(self.parts[0] if len(self.parts) == 1 else hashlib.sha256(b"".join(self.parts)).digest())

    def size_of(self, number: int) -> int:
        """Bytes of a part, counted from 1."""
        return min(self.part_bytes, self.size - (number - 1) * self.part_bytes)

    def read(self, number: int) -> bytes:
        """The bytes of a part, counted from 1."""
        with self.path.open("rb") as file:
            file.seek((number - 1) * self.part_bytes)
            return file.read(self.part_bytes)


@dataclass(frozen=True)
class Model:
    """A packed model as it is to lie in S3."""

    folder: Path
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        lines = "".join(f"{file.name} {file.checksum}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    @property
    def sessions(self) -> int | None:
        """What it admits, by its model-config.yaml; None where that is packed away."""
        path = self.folder / CONFIG
        return yaml.safe_load(path.read_text(encoding="utf-8"))["llava"]["max_sessions"] if path.is_file() else None

    @property
    def tail(self) -> str:
        """What its address ends with: the tarball's name, or nothing for a folder."""
        return TARBALL if [file.name for file in self.files] == [TARBALL] else ""


@dataclass(frozen=True)
class Address:
    """Where a model lies: a folder, with a slash at its end, or a tarball."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, uri: str) -> Address:
        """From `s3://bucket/key`."""
        parts = urlsplit(uri)
        key = parts.path.removeprefix("/")
        if parts.scheme != "s3" or not parts.netloc or not key:
            raise DeployError(f"{uri!r} is no address in S3: wanted s3://bucket/folder/ or s3://bucket/{TARBALL}")
        if not key.endswith((".tar.gz", "/")):
            key += "/"
        return cls(parts.netloc, key)

    @property
    def is_tarball(self) -> bool:
        return self.key.endswith(".tar.gz")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True)
class Uploaded:
    """A model in S3, and how many sessions it admits where that is known."""

    address: Address
    sessions: int | None


def read_model(folder: Path) -> Model:
    """The files of a packed model with their checksums. Reads every byte once."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    names = [path.relative_to(folder).as_posix() for path in paths]
    if MANIFEST not in names and names != [TARBALL]:
        raise DeployError(f"{folder} holds no packed model; make one: ./build_mar.sh --sagemaker --model ...")
    total = sum(path.stat().st_size for path in paths)
    with _bar("reading", total) as bar, ThreadPoolExecutor(THREADS) as pool:
        files = pool.map(lambda pair: _read_file(*pair, bar), zip(paths, names, strict=True))
        return Model(folder, tuple(files))


def _read_file(path: Path, name: str, bar: tqdm) -> File:
    size = path.stat().st_size
    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
    parts = []
    with path.open("rb") as file:
        while chunk := file.read(part_bytes):
            parts.append(hashlib.sha256(chunk).digest())
            bar.update(len(chunk))
    return File(path, name, size, part_bytes, tuple(parts) or (hashlib.sha256(b"").digest(),))


def address_of(account: Account, bucket: str | None, model: Model) -> Address:
    """Where this model belongs."""
    return Address(bucket or account.bucket, f"{account.name}/models/{model.digest}/{model.tail}")


def upload(account: Account, model: Model, address: Address) -> int:
    """Send what is not there yet; the number of bytes sent. The model is announced once all of it is there."""
    s3 = account.client("s3", Config(max_pool_connections=2 * THREADS))
    _ensure_bucket(account, s3, address.bucket)
    root = address.key.removesuffix(model.tail)
    uploads = _pending(s3, address.bucket, root)
    with _bar("sending", model.size) as bar, ThreadPoolExecutor(THREADS) as pool:
        errands = [_Upload(s3, address.bucket, root, file, uploads.get(root + file.name), bar) for file in model.files]
        there = list(pool.map(_Upload.is_there, errands))
        wanted = [errand for errand, done in zip(errands, there, strict=True) if not done]
        # The manifest goes last: where it is, all of the model is.
        for errands in ([e for e in wanted if not e.is_manifest], [e for e in wanted if e.is_manifest]):
            _run_all(pool, [part for errand in errands for part in errand.missing_parts()])
            _run_all(pool, [errand.finish for errand in errands])
        sent = sum(errand.sent for errand in wanted)
    body = json.dumps({"model": str(address), "sessions": model.sessions, "bytes": model.size})
    s3.put_object(Bucket=address.bucket, Key=_current_key(account), Body=body, ContentType="application/json")
    return sent


def current(account: Account, bucket: str | None) -> Uploaded:
    """The model that was uploaded last."""
    bucket = bucket or account.bucket
    try:
        body = account.client("s3").get_object(Bucket=bucket, Key=_current_key(account))["Body"].read()
    except ClientError as error:
        if code_of(error) in ("NoSuchKey", "NoSuchBucket"):
            raise DeployError(
                f"no model of {account.name!r} in s3://{bucket}: run `llava-deploy upload` first"
            ) from None
        raise
    told = json.loads(body)
    return Uploaded(Address.parse(told["model"]), told["sessions"])


def check_there(account: Account, address: Address) -> None:
    """Raises `DeployError` where an endpoint would find no packed model."""
    key = address.key if address.is_tarball else address.key + MANIFEST
    try:
        account.client("s3").head_object(Bucket=address.bucket, Key=key)
    except ClientError as error:
        if code_of(error) in ("404", "NoSuchKey", "NoSuchBucket"):
            missing = f"no {MANIFEST} under" if not address.is_tarball else "nothing at"
            raise DeployError(f"{missing} {address}: run `llava-deploy upload` first") from None
        raise


def delete_all(account: Account, bucket: str | None) -> int:
    """Delete everything of this endpoint's name; and the bucket, when it was made here and is empty then."""
    bucket, s3 = bucket or account.bucket, account.client("s3")
    if not _exists(s3, bucket):
        return 0
    keys = [item["Key"] for item in _pages(s3, "list_objects_v2", "Contents", bucket, f"{account.name}/")]
    for start in range(0, len(keys), 1000):
        batch = [{"Key": key} for key in keys[start : start + 1000]]
        failed = s3.delete_objects(Bucket=bucket, Delete={"Objects": batch, "Quiet": True}).get("Errors", [])
        if failed:
            raise DeployError(f"s3://{bucket}/{failed[0]['Key']} can't be deleted: {failed[0].get('Message')}")
    for item in _pages(s3, "list_multipart_uploads", "Uploads", bucket, f"{account.name}/"):
        s3.abort_multipart_upload(Bucket=bucket, Key=item["Key"], UploadId=item["UploadId"])
    if _is_ours(s3, bucket) and not s3.list_objects_v2(Bucket=bucket, MaxKeys=1).get("Contents"):
        s3.delete_bucket(Bucket=bucket)
    return len(keys)


class _Upload:
    """One file's way to S3: put at once when it is one part, else by parts, going on where an earlier try stopped."""

    def __init__(self, s3: Any, bucket: str, root: str, file: File, upload_id: str | None, bar: tqdm) -> None:
        self.sent = 0
        self.is_manifest = file.name == MANIFEST
        self._s3, self._file, self._bar = s3, file, bar
        self._target = {"Bucket": bucket, "Key": root + file.name}
        self._upload_id = upload_id
        self._done: dict[int, dict[str, Any]] = {}

    def is_there(self) -> bool:
        """Whether S3 has the file already, all of it and the same."""
        try:
            head = self._s3.head_object(**self._target, ChecksumMode="ENABLED")
        except ClientError as error:
            if code_of(error) == "404":
                return False
            raise
        checksum = head.get("ChecksumSHA256", "").partition("-")[0]
        there = head["ContentLength"] == self._file.size and checksum == self._file.checksum
        if there:
            self._bar.update(self._file.size)
        return there

    def missing_parts(self) -> Iterator[Any]:
        """What is left to send, as calls that can be made in any order, at the same time."""
        if len(self._file.parts) == 1:
            self.sent = self._file.size
            yield self._put
            return
        if self._upload_id is None:
            begun = self._s3.create_multipart_upload(**self._target, **SHA256, ChecksumType="COMPOSITE")
            self._upload_id = begun["UploadId"]
        else:
            self._find_done()
        for number in range(1, len(self._file.parts) + 1):
            if number not in self._done:
                self.sent += self._file.size_of(number)
                yield lambda number=number: self._send(number)

    def finish(self) -> None:
        """Make one object of the parts."""
        if len(self._file.parts) == 1:
            return
        parts = [self._done[number] for number in sorted(self._done)]
        self._s3.complete_multipart_upload(**self._target, UploadId=self._upload_id, MultipartUpload={"Parts": parts})

    def _find_done(self) -> None:
        pages = self._s3.get_paginator("list_parts").paginate(**self._target, UploadId=self._upload_id)
        for part in (part for page in pages for part in page.get("Parts", [])):
            number = part["PartNumber"]
            if number > len(self._file.parts) or part["Size"] != self._file.size_of(number):
                continue
            checksum = _base64(self._file.parts[number - 1])
            if part.get("ChecksumSHA256", checksum) == checksum:  # S3 compares them once more when the upload is ended
                self._done[number] = {"PartNumber": number, "ETag": part["ETag"], "ChecksumSHA256": checksum}
                self._bar.update(part["Size"])

    def _put(self) -> None:
        body = self._file.read(1)
        self._s3.put_object(**self._target, Body=body, **SHA256, ChecksumSHA256=_base64(self._file.parts[0]))
        self._bar.update(len(body))

    def _send(self, number: int) -> None:
        body, checksum = self._file.read(number), _base64(self._file.parts[number - 1])
        sums = {**SHA256, "ChecksumSHA256": checksum}
        reply = self._s3.upload_part(**self._target, UploadId=self._upload_id, PartNumber=number, Body=body, **sums)
        self._done[number] = {"PartNumber": number, "ETag": reply["ETag"], "ChecksumSHA256": checksum}
        self._bar.update(len(body))


def _run_all(pool: ThreadPoolExecutor, tasks: Iterable[Any]) -> None:
    """Run all; at the first that fails, or Ctrl-C, start no more of them."""
    futures = [pool.submit(task) for task in tasks]
    try:
        for future in futures:
            future.result()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def _ensure_bucket(account: Account, s3: Any, bucket: str) -> None:
    """The bucket, made private where it is missing. S3 encrypts by itself."""
    if _exists(s3, bucket):
        return
    if bucket != account.bucket:
        raise DeployError(f"there is no bucket {bucket!r}; make it, or leave --bucket out to have one made")
    place = {} if account.region == "us-east-1" else {"LocationConstraint": account.region}
    s3.create_bucket(Bucket=bucket, **({"CreateBucketConfiguration": place} if place else {}))
    closed = dict.fromkeys(("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"), True)
    s3.put_public_access_block(Bucket=bucket, PublicAccessBlockConfiguration=closed)
    s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": [MADE_BY]})


def _exists(s3: Any, bucket: str) -> bool:
    try:
        s3.head_bucket(Bucket=bucket)
    except ClientError as error:
        if code_of(error) == "404":
            return False
        if code_of(error) in ("403", "301"):
            raise DeployError(
                f"the bucket {bucket!r} is another account's or in another region; choose one: --bucket"
            ) from None
        raise
    return True


def _is_ours(s3: Any, bucket: str) -> bool:
    try:
        return MADE_BY in s3.get_bucket_tagging(Bucket=bucket)["TagSet"]
    except ClientError as error:
        if code_of(error) == "NoSuchTagSet":
            return False
        raise


def _pending(s3: Any, bucket: str, prefix: str) -> dict[str, str]:
    """Multipart uploads that were begun and not ended: the latest of each key."""
    items = _pages(s3, "list_multipart_uploads", "Uploads", bucket, prefix)
    return {item["Key"]: item["UploadId"] for item in sorted(items, key=lambda item: item["Initiated"])}


def _pages(s3: Any, operation: str, key: str, bucket: str, prefix: str) -> list[dict[str, Any]]:
    pages = s3.get_paginator(operation).paginate(Bucket=bucket, Prefix=prefix)
    return [item for page in pages for item in page.get(key, [])]


def _current_key(account: Account) -> str:
    return f"{account.name}/{CURRENT}"


@contextmanager
def _bar(label: str, total: int) -> Iterator[tqdm]:
    """Progress on a terminal, nothing elsewhere."""
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        yield bar


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
