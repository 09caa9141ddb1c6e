"""Waiting pictures: encode the one that has waited longest, on a GPU together with others of its shape."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..ipc.messages import PreparedPicture
from . import vision
from .content import Features, FeatureStore, SessionPicture, check_feature_count
from .device import Stopwatch
from .failures import Failures
from .faults import first_line, is_out_of_memory, raise_if_device_lost
from .memory import DeviceMemory
from .model import Model
from .session import EngineSession

log = logging.getLogger(__name__)

# Tiles of the pictures that a GPU encodes in one batch: a picture of LLaVA-1.5 is one tile. An encode launches the same
# kernels for one tile and for eight. By estimate, not measured, eight take an A10G as long as a chunk of a prefill.
GPU_TILES = 8


@dataclass(frozen=True)
class _Waiting:
    """A picture without features: `session.pictures[index]`."""

    session: EngineSession
    index: int
    picture: SessionPicture


class PictureEncoder:
    """Encodes the pictures of the engine's sessions. Runs in the engine's thread."""

    def __init__(
        self,
        model: Model,
        *,
        sessions: Mapping[str, EngineSession],
        features: FeatureStore,
        device_memory: DeviceMemory,
        failures: Failures,
    ) -> None:
        """All but `model` are the engine's own."""
        self._model = model
        self._sessions = sessions
        self._features = features
        self._device_memory = device_memory
        self._failures = failures
        # Most tiles of a batch. On a CPU a batch is no faster, so pictures are encoded one by one. Tests set it.
        self.most_tiles = GPU_TILES if model.device.type == "cuda" else 1

    def encode_next(self) -> bool:
        """Encode one batch of pictures, or some frames of a clip; return whether there was one.

        An error of a batch is not assigned to a picture: the first picture is then encoded alone. Its failure ends the
        turn that shows it, or the opening.
        """
        for each in self._sessions.values():
            each.attach_features(self._features)
        batch = _next_batch(self._sessions.values(), self.most_tiles)
        if len(batch) > 1:
            try:
                self._encode(batch)
                return True
            except Exception as error:
                raise_if_device_lost(error, self._model.device)
                log.warning("encode_batch_failed pictures=%d error=%s", len(batch), first_line(error))
        for waiting in batch[:1]:
            try:
                self._encode([waiting])
            except Exception as error:
                self._fail(waiting, error)
        return bool(batch)

    def _encode(self, batch: list[_Waiting]) -> None:
        """Give the pictures of a batch their features. Raises the errors of the model; nothing is then changed.

        A clip gets its features with its last piece.
        """
        watch = Stopwatch(self._model.device)
        encoded = self._run(batch)
        watch.stop()
        if not encoded:
            batch[0].session.encodings.append(watch)
        for waiting, rows in zip(batch if encoded else (), encoded, strict=True):
            self._accept(waiting, Features(rows), watch)
        self._device_memory.bound_pool()

    def _run(self, batch: list[_Waiting]) -> list[torch.Tensor]:
        """Return the features of a batch. Of a clip encode the next piece; return an empty list before the last one."""
        first = batch[0].picture
        prepared = [_checked(waiting.picture.prepared) for waiting in batch]
        if not vision.is_clip(prepared[0]):
            return self._model.encode_batch(prepared)
        if first.pieces is None:
            first.pieces = vision.clip_pieces(self._model.vision, prepared[0], self._model.dtype, self._model.device)
        try:
            rows = next(first.pieces)
        except Exception:
            first.pieces = None
            raise
        return [] if rows is None else [rows]

    def _accept(self, waiting: _Waiting, features: Features, watch: Stopwatch) -> None:
        """Store the features of a picture. Their wrong number is an error of this picture alone."""
        session = waiting.session
        picture = waiting.picture
        picture.features = features
        try:
            check_feature_count(session.pictures, len(session.image_positions))
        except ValueError as error:
            self._fail(waiting, error)
            return
        picture.prepared = None
        picture.pieces = None
        self._features.add(picture.key, features)
        session.encodings.append(watch)

    def _fail(self, waiting: _Waiting, error: Exception) -> None:
        session = waiting.session
        raise_if_device_lost(error, self._model.device)
        if is_out_of_memory(error):
            self._failures.retry_or_reject(session, error)
            return
        log.error("encode_failed session=%s", session.id[:12], exc_info=error)
        turn = session.turn
        is_of_turn = turn is not None and not turn.is_waiting and waiting.index >= turn.start_pictures
        self._failures.fail(session, error, ends_opening=not is_of_turn)


def _checked(prepared: PreparedPicture | None) -> PreparedPicture:
    if prepared is None:
        raise ValueError("the picture has no arrays to encode")
    return prepared


def _next_batch(sessions: Iterable[EngineSession], most_tiles: int) -> list[_Waiting]:
    """Return the picture that has waited longest, with others of the same shape up to `most_tiles` tiles.

    Equal pictures are encoded once. A clip is encoded alone.
    """
    waiting = [
        _Waiting(session, index, picture)
        for session in sorted((s for s in sessions if s.active and not s.encoded), key=lambda s: s.ticket)
        for index, picture in enumerate(session.pictures)
        if picture.features is None
    ]
    if not waiting:
        return []
    shape = _shape(waiting[0].picture)
    fitting: dict[str, _Waiting] = {}
    for one in waiting:
        if _shape(one.picture) == shape:
            fitting.setdefault(one.picture.key, one)
    count = max(most_tiles // _tiles(waiting[0].picture), 1)
    return list(fitting.values())[:count]


def _shape(picture: SessionPicture) -> Hashable:
    """Return a key that is equal for pictures which the vision tower takes together."""
    if picture.prepared is None or "pixel_values" not in picture.prepared.inputs:
        return id(picture)
    arrays = picture.prepared.inputs.items()
    # Pictures that were alone in their request are tiled, others are not.
    counts = tuple(array.tobytes() for name, array in arrays if name == "batch_num_images")
    return tuple((name, array.shape) for name, array in arrays), counts


def _tiles(picture: SessionPicture) -> int:
    """Return the tiles of a picture: the second of five dimensions of its pixels."""
    pixels = None if picture.prepared is None else picture.prepared.inputs.get("pixel_values")
    return pixels.shape[1] if pixels is not None and pixels.ndim == 5 else 1
