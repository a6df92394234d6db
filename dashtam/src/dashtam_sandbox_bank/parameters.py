"""Parameters of a query or of a form, as far as they can be told."""

from collections.abc import Mapping
from urllib.parse import parse_qsl

from starlette.requests import Request

MOST_PARAMETERS = 50


class UnreadableParameters(Exception):
    """What was sent is no list of parameters."""


class Parameters:
    """Names and values; a name can be repeated."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self.datalist: dict[str, list[str]] = {}
        for name, value in pairs:
            self.datalist.setdefault(name, []).append(value)
        self.data: Mapping[str, str] = {name: values[-1] for name, values in self.datalist.items()}

    def get(self, name: str) -> str | None:
        return self.data.get(name)

    @property
    def repeated(self) -> str | None:
        """One of the names that come more than once."""
        return next((name for name, values in self.datalist.items() if len(values) > 1), None)

    @classmethod
    def of_query(cls, request: Request) -> "Parameters":
        """Raises `UnreadableParameters`."""
        query: bytes = request.scope["query_string"]
        return cls(_pairs(query))

    @classmethod
    async def of_form(cls, request: Request) -> "Parameters":
        """Raises `UnreadableParameters`."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/x-www-form-urlencoded":
            raise UnreadableParameters("The body must be application/x-www-form-urlencoded.")
        return cls(_pairs(await request.body()))


def _pairs(encoded: bytes) -> list[tuple[str, str]]:
    try:
        pairs = parse_qsl(
            encoded.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MOST_PARAMETERS, errors="replace"
        )
    except ValueError:
        raise UnreadableParameters(f"There are more than {MOST_PARAMETERS} parameters.") from None
    return [(name, value) for name, value in pairs if value]  # without a value is left out (RFC 6749, 3.1)
