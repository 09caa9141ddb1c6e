"""Models in S3: upload the output of `build_mar.sh --sagemaker` in parallel parts, find and delete models.

The checksum of a model's content is part of its key. Therefore an upload never changes a model that an endpoint reads,
and files that are already in S3 are not sent again. An interrupted upload resumes, since its parts can only belong to
the same file. S3 verifies the SHA-256 of each part.
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
class ModelFile:
    """One file of a model, with the SHA-256 of each of its parts."""

    path: Path
    name: str
    size: int
    part_bytes: int
    parts: tuple[bytes, ...]

    @property
    def checksum(self) -> str:
        """The checksum as S3 computes it: of the bytes, or of the checksums of several parts.

        For several parts, S3 appends a hyphen and their number.
        """
        return _base64(self.parts[0] if len(self.parts) == 1 else hashlib.sha256(b"".join(self.parts)).digest())

    def size_of(self, number: int) -> int:
        """Return the size of a part. Parts are counted from 1."""
        return min(self.part_bytes, self.size - (number - 1) * self.part_bytes)

    def read(self, number: int) -> bytes:
        """Return the bytes of a part. Parts are counted from 1."""
        with self.path.open("rb") as file:
            file.seek((number - 1) * self.part_bytes)
            return file.read(self.part_bytes)


@dataclass(frozen=True)
class LocalModel:
    """A packed model to upload."""

    folder: Path
    files: tuple[ModelFile, ...]

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """A checksum of all names and contents."""
        lines = "".join(f"{file.name} {file.checksum}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    @property
    def sessions(self) -> int | None:
        """The maximum number of sessions in model-config.yaml; None if that file is in a tarball."""
        path = self.folder / CONFIG
        return yaml.safe_load(path.read_text(encoding="utf-8"))["llava"]["max_sessions"] if path.is_file() else None

    @property
    def tail(self) -> str:
        """The end of its address: the name of the tarball, or nothing for a folder."""
        return TARBALL if [file.name for file in self.files] == [TARBALL] else ""


@dataclass(frozen=True)
class ModelAddress:
    """The address of a model in S3: a folder, with a slash at its end, or a tarball."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, uri: str) -> ModelAddress:
        """Parse `s3://bucket/key`. Raise `DeployError`."""
        parts = urlsplit(uri)
        key = parts.path.removeprefix("/")
        if parts.scheme != "s3" or not parts.netloc or not key:
            raise DeployError(f"`--model` must be s3://bucket/folder/ or s3://bucket/{TARBALL}, got {uri!r}")
        if not key.endswith((".tar.gz", "/")):
            key += "/"
        return cls(parts.netloc, key)

    @property
    def is_tarball(self) -> bool:
        """Whether the address is that of a tarball."""
        return self.key.endswith(".tar.gz")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True)
class UploadedModel:
    """A model in S3, and its maximum number of sessions if that is known."""

    address: ModelAddress
    sessions: int | None


def read_model(folder: Path) -> LocalModel:
    """Return a packed model with the checksums of its files. Reads every byte once. Raise `DeployError`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    names = [path.relative_to(folder).as_posix() for path in paths]
    if MANIFEST not in names and names != [TARBALL]:
        raise DeployError(f"{folder} holds no packed model; make one: ./build_mar.sh --sagemaker --model ...")
    total = sum(path.stat().st_size for path in paths)
    with _bar("reading", total) as bar, ThreadPoolExecutor(THREADS) as pool:
        files = pool.map(lambda path, name: _read_file(path, name, bar), paths, names)
        return LocalModel(folder, tuple(files))


def _read_file(path: Path, name: str, bar: tqdm) -> ModelFile:
    size = path.stat().st_size
    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
    parts = []
    with path.open("rb") as file:
        while chunk := file.read(part_bytes):
            parts.append(hashlib.sha256(chunk).digest())
            bar.update(len(chunk))
    return ModelFile(path, name, size, part_bytes, tuple(parts) or (hashlib.sha256(b"").digest(),))


def address_of(account: Account, bucket: str | None, model: LocalModel) -> ModelAddress:
    """Return the address of this model in S3."""
    return ModelAddress(bucket or account.bucket, f"{account.name}/models/{model.digest}/{model.tail}")


def upload(account: Account, model: LocalModel, address: ModelAddress) -> int:
    """Upload the files that are missing in S3. Return the number of bytes sent.

    The model becomes the current one after its last file.
    """
    s3 = account.client("s3", Config(max_pool_connections=2 * THREADS))
    _ensure_bucket(account, s3, address.bucket)
    root = address.key.removesuffix(model.tail)
    uploads = _pending(s3, address.bucket, root)
    with _bar("sending", model.size) as bar, ThreadPoolExecutor(THREADS) as pool:
        files = []
        for file in model.files:
            upload_id = uploads.get(root + file.name)
            files.append(_FileUpload(s3, address.bucket, root, file, upload_id=upload_id, bar=bar))
        done = list(pool.map(_FileUpload.is_complete, files))
        missing = [file for file, is_done in zip(files, done, strict=True) if not is_done]
        # The manifest is last: a model with a manifest is complete.
        for batch in ([f for f in missing if not f.is_manifest], [f for f in missing if f.is_manifest]):
            _run_all(pool, [part for file in batch for part in file.missing_parts()])
            _run_all(pool, [file.finish for file in batch])
        sent = sum(file.sent for file in missing)
    body = json.dumps({"model": str(address), "sessions": model.sessions, "bytes": model.size})
    s3.put_object(Bucket=address.bucket, Key=_current_key(account), Body=body, ContentType="application/json")
    return sent


def current(account: Account, bucket: str | None) -> UploadedModel:
    """Return the model that was uploaded last. Raise `DeployError` if there is none."""
    bucket = bucket or account.bucket
    try:
        body = account.client("s3").get_object(Bucket=bucket, Key=_current_key(account))["Body"].read()
    except ClientError as error:
        if code_of(error) in ("NoSuchKey", "NoSuchBucket"):
            raise DeployError(
                f"no model of {account.name!r} in s3://{bucket}: run `llava-deploy upload` first"
            ) from None
        raise
    note = json.loads(body)
    return UploadedModel(ModelAddress.parse(note["model"]), note["sessions"])


def check_exists(account: Account, address: ModelAddress) -> None:
    """Raise `DeployError` if there is no packed model at the address."""
    key = address.key if address.is_tarball else address.key + MANIFEST
    try:
        account.client("s3").head_object(Bucket=address.bucket, Key=key)
    except ClientError as error:
        if code_of(error) in ("404", "NoSuchKey", "NoSuchBucket"):
            missing = f"no {MANIFEST} under" if not address.is_tarball else "nothing at"
            raise DeployError(f"{missing} {address}: run `llava-deploy upload` first") from None
        raise


def read_file(account: Account, address: ModelAddress, name: str) -> bytes | None:
    """Return a file of a model that is a folder, or None if there is no such file."""
    try:
        return account.client("s3").get_object(Bucket=address.bucket, Key=address.key + name)["Body"].read()
    except ClientError as error:
        if code_of(error) == "NoSuchKey":
            return None
        raise


def size_of(account: Account, address: ModelAddress, suffix: str) -> int:
    """Return the size in bytes of all files of a model whose names have this ending."""
    items = _pages(account.client("s3"), "list_objects_v2", "Contents", address.bucket, address.key)
    return sum(item["Size"] for item in items if item["Key"].endswith(suffix))


def delete_all(account: Account, bucket: str | None) -> int:
    """Delete all models and journals of this endpoint, and the bucket if `upload` made it and it is empty then.

    Return the number of deleted objects.
    """
    bucket = bucket or account.bucket
    s3 = account.client("s3")
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


class _FileUpload:
    """The upload of one file, at once or in several parts. Resumes an earlier upload with `upload_id`."""

    def __init__(self, s3: Any, bucket: str, root: str, file: ModelFile, *, upload_id: str | None, bar: tqdm) -> None:
        self.sent = 0
        self.is_manifest = file.name == MANIFEST
        self._s3 = s3
        self._file = file
        self._bar = bar
        self._target = {"Bucket": bucket, "Key": root + file.name}
        self._upload_id = upload_id
        self._done: dict[int, dict[str, Any]] = {}

    def is_complete(self) -> bool:
        """Return whether S3 has the same file already."""
        try:
            head = self._s3.head_object(**self._target, ChecksumMode="ENABLED")
        except ClientError as error:
            if code_of(error) == "404":
                return False
            raise
        checksum = head.get("ChecksumSHA256", "").partition("-")[0]
        is_same = head["ContentLength"] == self._file.size and checksum == self._file.checksum
        if is_same:
            self._bar.update(self._file.size)
        return is_same

    def missing_parts(self) -> Iterator[Any]:
        """Yield calls that send the missing parts. They may run in any order and at the same time."""
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
        """Complete an upload of several parts."""
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
            if part.get("ChecksumSHA256", checksum) == checksum:  # S3 verifies them again when the upload completes
                self._done[number] = {"PartNumber": number, "ETag": part["ETag"], "ChecksumSHA256": checksum}
                self._bar.update(part["Size"])

    def _put(self) -> None:
        body = self._file.read(1)
        self._s3.put_object(**self._target, Body=body, **SHA256, ChecksumSHA256=_base64(self._file.parts[0]))
        self._bar.update(len(body))

    def _send(self, number: int) -> None:
        body = self._file.read(number)
        checksum = _base64(self._file.parts[number - 1])
        sums = {**SHA256, "ChecksumSHA256": checksum}
        reply = self._s3.upload_part(**self._target, UploadId=self._upload_id, PartNumber=number, Body=body, **sums)
        self._done[number] = {"PartNumber": number, "ETag": reply["ETag"], "ChecksumSHA256": checksum}
        self._bar.update(len(body))


def _run_all(pool: ThreadPoolExecutor, tasks: Iterable[Any]) -> None:
    """Run all tasks. Start no more of them after the first error or Ctrl-C."""
    futures = [pool.submit(task) for task in tasks]
    try:
        for future in futures:
            future.result()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def _ensure_bucket(account: Account, s3: Any, bucket: str) -> None:
    """Make the bucket if it is missing, without public access. S3 encrypts by default."""
    if _exists(s3, bucket):
        return
    if bucket != account.bucket:
        raise DeployError(f"there is no bucket {bucket!r}; make it, or omit --bucket to use the default bucket")
    region = {} if account.region == "us-east-1" else {"LocationConstraint": account.region}
    s3.create_bucket(Bucket=bucket, **({"CreateBucketConfiguration": region} if region else {}))
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
                f"the bucket {bucket!r} belongs to another account or region; choose another: --bucket"
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
    """Return the latest incomplete multipart upload of each key."""
    items = _pages(s3, "list_multipart_uploads", "Uploads", bucket, prefix)
    return {item["Key"]: item["UploadId"] for item in sorted(items, key=lambda item: item["Initiated"])}


def _pages(s3: Any, operation: str, key: str, bucket: str, prefix: str) -> list[dict[str, Any]]:
    pages = s3.get_paginator(operation).paginate(Bucket=bucket, Prefix=prefix)
    return [item for page in pages for item in page.get(key, [])]


def _current_key(account: Account) -> str:
    return f"{account.name}/{CURRENT}"


@contextmanager
def _bar(label: str, total: int) -> Iterator[tqdm]:
    """Show progress on a terminal, and nothing elsewhere."""
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        yield bar


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
