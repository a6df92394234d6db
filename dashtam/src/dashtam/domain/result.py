"""What a use case answers: a value, or an error that was to be expected."""

from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeAlias, TypeVar

T = TypeVar("T", covariant=True)
E = TypeVar("E", bound="Error", covariant=True)


class Error(Exception):
    """Something a person or another program can be told; anything else is a fault of ours."""

    reason: ClassVar[str] = "error"
    """One machine-readable word: what *Failed* events and the API say. Stored, so it never changes."""


@dataclass(frozen=True, slots=True)
class Success(Generic[T]):
    value: T

    def is_success(self) -> Literal[True]:
        return True


@dataclass(frozen=True, slots=True)
class Failure(Generic[E]):
    error: E

    def is_success(self) -> Literal[False]:
        return False


Result: TypeAlias = Success[T] | Failure[E]
