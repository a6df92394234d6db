"""Tells failures of one cause from others: equal for all deliveries that died in the same place of the same thing."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Final

_FRAME: Final = re.compile(r'File "(?P<path>[^"\n]+)", line \d+, in (?P<function>[^\n]+)')
_FOREIGN: Final = re.compile(r"[/\\](?:site-packages|dist-packages|[Ll]ib[/\\]python3[^/\\]*)[/\\]|^<")
_HERE: Final = os.path.dirname(__file__)
"""Frames of libraries, of Python's own modules and of this package: where it was raised, but not whose fault it is."""
_VARYING: Final = re.compile(
    r"""(?P<id>\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b)
    |(?P<quoted>(?<!\w)'[^'\n]*'|"[^"\n]*"|`[^`\n]*`)
    |(?P<number>\b0x[0-9a-fA-F]+\b|\d+)
    |(?P<address>[\w.+-]+@[\w.-]+)""",
    re.VERBOSE,
)
_LONGEST: Final = 500


def fingerprint_of(error_type: str, message: str | None, traceback: str | None) -> str:
    """Twelve hexadecimal digits for what was raised, where, and what it says but for numbers, ids and quoted text.

    Line numbers don't count, nor where the application is installed: a failure keeps its fingerprint over a deploy
    that does not touch it.
    """
    said = _VARYING.sub("*", (message or "").partition("\n")[0][:_LONGEST])
    told = "\n".join((error_type, _place(traceback or ""), said))
    return hashlib.blake2b(told.encode("utf-8", "replace"), digest_size=6).hexdigest()


def _place(traceback: str) -> str:
    """The innermost function of the application's, by its file; else the innermost of all."""
    innermost = ""
    for frame in _FRAME.finditer(traceback):
        path, function = frame["path"], frame["function"]
        place = "/".join(re.split(r"[/\\]", path)[-2:]) + f":{function}"
        if not _FOREIGN.search(path) and not path.startswith(_HERE):
            innermost = place
        elif not innermost or innermost.startswith("?"):
            innermost = f"?{place}"
    return innermost
