"""Dashtam's catalogue, and where it is kept: `make catalogue` runs this, and writes it anew."""

import re
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from dashtam.bootstrap import Settings, build
from dashtam.infrastructure.secret_keys import make_key
from whereupon.catalogue import Catalogue, as_text

ROOT: Final = Path(__file__).parents[2]
KEPT: Final = ROOT / "dashtam" / "events.asyncapi.json"
PAGE: Final = ROOT / "docs" / "dashtam.md"
MAP: Final = re.compile(r"(?<=^```mermaid\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
"""The map on that page."""


def dashtam() -> Catalogue:
    """Of the application as it is wired, without a database."""
    settings = Settings(database_url="sqlite+aiosqlite:///:memory:", secret_keys=(SecretStr(make_key()),))
    return Catalogue.of(build(settings).bus, title="Dashtam", version="0.1.0", packages=["dashtam"])


def main() -> None:
    catalogue = dashtam()
    KEPT.write_text(as_text(catalogue.asyncapi()), encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MAP.sub(lambda _: catalogue.mermaid(), page, count=1), encoding="utf-8")
    print(f"{KEPT.relative_to(ROOT)} and the map in {PAGE.relative_to(ROOT)} are as the code is.")


if __name__ == "__main__":
    main()
