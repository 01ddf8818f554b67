"""What ranks that torchrun started tell each other through its store: JSON of known types, signed.

The store listens on all interfaces and asks nobody who he is. So what is read there is data and nothing else, and where
the ranks share a secret (`run_secret`), what none of them has signed counts as not there. A signature is an HMAC-SHA256
(RFC 2104) of the try of the run, the key and the text: a message is worth nothing under another key or in another try.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.errors import (
    CheckpointError,
    ConfigError,
    CrossdockError,
    FaultKind,
    LaunchError,
    RankError,
    RequestCancelled,
    RequestError,
    RequestRefused,
    RequestTimeout,
    UserError,
)

T = TypeVar("T")

MAX_BYTES = 2**20
"""A longer message is refused unread; those of ranks have a few thousand."""
_MAX_TEXT = 100_000
_EMPTY = "-"

_USER_ERRORS: tuple[type[UserError], ...] = (
    UserError,
    ConfigError,
    CheckpointError,
    RequestError,
    RequestRefused,
    LaunchError,
)
_ENDS: tuple[type[RequestCancelled], ...] = (RequestCancelled, RequestTimeout)
_BY_NAME: dict[str, type[Any]] = {kind.__name__: kind for kind in (*_USER_ERRORS, *_ENDS)}


@dataclass(frozen=True)
class ErrorNote:
    """A `CrossdockError` in words and numbers. `name` is that of its class; the other fields are its arguments."""

    name: Literal[
        "UserError",
        "ConfigError",
        "CheckpointError",
        "RequestError",
        "RequestRefused",
        "LaunchError",
        "RequestCancelled",
        "RequestTimeout",
        "RankError",
        "CompositionError",
        "CrossdockError",
    ]
    message: str
    key: str | None = None
    finished_steps: int = 0
    rank: int = 0
    kind: FaultKind = "raised"

    @classmethod
    def of(cls, error: CrossdockError) -> ErrorNote:
        """Of a class that is not known here, or of one that carries more than text (violations), what it says."""
        name: Any = type(error).__name__
        match error:
            case UserError() if type(error) in _USER_ERRORS:
                return cls(name, _readable(error.message), key=error.key)
            case RequestCancelled() if type(error) in _ENDS:
                return cls(name, _readable(error.reason), finished_steps=error.finished_steps)
            case RankError() if type(error) is RankError:
                return cls(name, _readable(error.message), rank=error.rank, kind=error.kind)
            case CompositionError():
                return cls("CompositionError", _readable(str(error)))
        return cls("CrossdockError", _readable(str(error) if type(error) is CrossdockError else f"{name}: {error}"))

    def error(self) -> CrossdockError:
        if self.name == "RankError":
            return RankError(self.rank, self.message, self.kind)
        if self.name == "CompositionError":
            return CompositionError(self.message)
        known = _BY_NAME.get(self.name)
        if known is None:
            return CrossdockError(self.message)
        more = self.finished_steps if issubclass(known, RequestCancelled) else self.key
        error: CrossdockError = known(self.message, more)
        return error


def _readable(text: str) -> str:
    """Not too long, and without what UTF-8 cannot say: an error may quote anything."""
    return text[:_MAX_TEXT].encode("utf-8", "backslashreplace").decode()


_NOTE = TypeAdapter(ErrorNote)

CarriedError = Annotated[
    CrossdockError,
    PlainValidator(lambda value: _NOTE.validate_python(value).error()),
    PlainSerializer(ErrorNote.of, return_type=ErrorNote),
]
"""An error as a field of a message."""


@dataclass(frozen=True)
class Lead:
    """Rank `rank` judges; `beat`: the number of its latest beat; `suspects`: the ranks it cannot hear."""

    rank: int
    beat: int
    suspects: tuple[int, ...]


@dataclass(frozen=True)
class Reporter:
    """The rank that says what went wrong; `once`: different each time that a rank wants to."""

    rank: int
    once: str


class MessageStore:
    """Dataclasses in a store, which has text only and waits for a key that does not exist: nothing is `-`.

    Args:
        store: torchrun's; whatever it raises when it is away is a RuntimeError.
        secret: of the run; None: nothing is signed, and everything that is well-formed counts.
        try_name: which try of which run this is.
        on_refused: gets the key of a message that is not taken, and why.
    """

    def __init__(
        self,
        store: Any,
        secret: bytes | None,
        try_name: str,
        on_refused: Callable[[str, str], None] = lambda key, reason: None,
    ) -> None:
        self._store = store
        self._secret = secret
        self._try_name = try_name
        self._on_refused = on_refused
        self._adapters: dict[type[Any], TypeAdapter[Any]] = {}  # making one takes milliseconds

    def clear(self, keys: Sequence[str]) -> None:
        """What is there already stays."""
        for key in keys:
            self._store.compare_set(key, "", _EMPTY)

    def put(self, key: str, message: object) -> None:
        self._store.set(key, self._packed(key, message))

    def put_first(self, key: str, message: T) -> T:
        """The message of whoever came first; what is there and is none is written over. The key need not exist."""
        packed = self._packed(key, message)
        there = self._store.compare_set(key, "", packed)
        if bytes(there) == _EMPTY.encode():
            there = self._store.compare_set(key, _EMPTY, packed)
        first = self._unpacked(key, bytes(there), type(message))
        if first is None:
            self._store.set(key, packed)
        return message if first is None else first

    def get(self, keys: Sequence[str], kind: type[T]) -> list[T | None]:
        """The messages under these keys, which exist. None: there is nothing, or nothing that counts."""
        values = self._store.multi_get(list(keys))
        return [self._unpacked(key, bytes(value), kind) for key, value in zip(keys, values, strict=True)]

    def _packed(self, key: str, message: object) -> str:
        text = self._adapter(type(message)).dump_json(message).decode()
        return f"{self._signature(key, text.encode())}\n{text}"

    def _unpacked(self, key: str, value: bytes, kind: type[T]) -> T | None:
        if value == _EMPTY.encode():
            return None
        signature, _, text = value.partition(b"\n")
        reason = ""
        if len(value) > MAX_BYTES:
            reason = f"it has {len(value)} bytes"
        elif not hmac.compare_digest(signature, self._signature(key, text).encode()):
            reason = "it is not signed with this run's secret"
        else:
            try:
                message: T = self._adapter(kind).validate_json(text, strict=True)
                return message
            except (ValidationError, RecursionError):
                reason = f"it is no {kind.__name__}"
        self._on_refused(key, reason)
        return None

    def _adapter(self, kind: type[Any]) -> TypeAdapter[Any]:
        if kind not in self._adapters:
            self._adapters[kind] = TypeAdapter(kind)
        return self._adapters[kind]

    def _signature(self, key: str, text: bytes) -> str:
        if self._secret is None:
            return ""
        signed = b"\n".join((self._try_name.encode(), key.encode(), text))
        return hmac.new(self._secret, signed, hashlib.sha256).hexdigest()
