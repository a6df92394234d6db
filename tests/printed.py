"""Runs what a page of the documentation prints, chapter by chapter: its Python, its commands, and what becomes of them.

A chapter (`## …`) runs in a process and a folder of its own; its blocks run in the order that they are printed in.

- `python` whose first line is a file's name (`# app.py`) is that file, and in the folder of every chapter. Other
  `python` shares one namespace, with `await` at its top level.
- `text` or `json` right behind it is what it prints or, as `Error: message`, what it raises. Line breaks don't count.
- `console` holds commands (`$ …`) with what they print. `^C` stands for Ctrl-C, once what is above it was printed.
- `<event id>` and the like stand for what is another with each run, and in a command for what was met there last; `…`
  that stands alone is anything.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import os
import re
import shlex
import signal
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PATIENCE: Final = 120.0  # seconds until what must happen counts as not happening
PROGRAMS: Final = {"whereupon": ("-m", "whereupon.cli"), "pytest": ("-m", "pytest", "-p", "no:cacheprovider")}
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PLACEHOLDER = re.compile(r"<[a-z][a-z ]*>|(?<!\S)…(?!\S)")
_ID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


@dataclass(frozen=True, slots=True)
class Block:
    chapter: str
    line: int
    """Where its text begins in the page."""
    language: str
    text: str
    shown: str | None = None
    """What the page says that Python prints or raises."""

    @property
    def file(self) -> str | None:
        found = re.match(r"# (\w+\.py)\n", self.text)
        return found[1] if found is not None and self.language == "python" else None


def blocks_of(page: str) -> list[Block]:
    """The page's blocks, with what Python prints at its block."""
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(page):
        language, text = match[1], match[2]
        directly = not page[end : match.start()].strip()
        end = match.end()
        if language in ("text", "json") and directly and found and found[-1].language == "python":
            before = found.pop()
            found.append(Block(before.chapter, before.line, "python", before.text, text))
            continue
        headings = re.findall(r"^## (.+)$", page[: match.start()], re.MULTILINE)
        line = page.count("\n", 0, match.start(2)) + 1
        found.append(Block(headings[-1] if headings else "", line, language, text))
    return found


def is_as_shown(shown: str, printed: str, met: dict[str, str]) -> bool:
    """Whether that is what was printed; notes in `met` what placeholders stand for."""
    text = " ".join(shown.split())
    names: list[str] = []
    pattern, at = "", 0
    for placeholder in _PLACEHOLDER.finditer(text):
        pattern += re.escape(text[at : placeholder.start()])
        pattern += f"({_ID})" if placeholder[0].endswith("id>") else "(.*?)" if placeholder[0] == "…" else "(.+?)"
        names.append(placeholder[0])
        at = placeholder.end()
    found = re.fullmatch(pattern + re.escape(text[at:]), " ".join(printed.split()))
    if found is not None:
        met.update(zip(names, found.groups(), strict=True))
    return found is not None


class Chapter:
    """One run of a chapter, in the current folder."""

    def __init__(self, blocks: list[Block], title: str) -> None:
        self.blocks = [block for block in blocks if block.chapter == title and block.file is None]
        self.files = {block.file: block.text for block in blocks if block.file is not None}
        self.module = types.ModuleType("chapter")
        self.met: dict[str, str] = {}
        self.problems: list[str] = []

    def write_files(self) -> None:
        for name, text in self.files.items():
            Path(name).write_text(text, encoding="utf-8")

    async def run(self) -> list[str]:
        """What is not as the page shows it."""
        sys.modules[self.module.__name__] = self.module  # where annotations written as text are looked up
        try:
            for block in self.blocks:
                if block.language == "python":
                    self.compare(block.line, block.shown or "", await self.printed_by(block))
                elif block.language == "console":
                    await self.type_in(block)
                else:
                    self.problems.append(f"line {block.line}: nobody runs a block of {block.language}")
        finally:
            await self.let_go()
        return self.problems

    def compare(self, line: int, shown: str, printed: str) -> None:
        if not is_as_shown(shown, printed, self.met):
            self.problems.append(f"line {line}: it is shown as\n{shown}\nand is\n{printed}")

    async def printed_by(self, block: Block) -> str:
        tree = ast.increment_lineno(ast.parse(block.text), block.line - 1)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                code = compile(tree, "page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                running = eval(code, self.module.__dict__)
                if running is not None:
                    async with asyncio.timeout(PATIENCE):
                        await running
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
        return printed.getvalue()

    async def type_in(self, block: Block) -> None:
        nothing, *commands = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
        if nothing:
            self.problems.append(f"line {block.line}: a block of commands begins with `$ `")
        for command in commands:
            line, _, shown = command.partition("\n")
            unmet = [name for name in _PLACEHOLDER.findall(line) if name not in self.met]
            if unmet:
                self.problems.append(f"line {block.line}: nothing says what {', '.join(unmet)} in `{line}` is")
                continue
            program, *arguments = shlex.split(_PLACEHOLDER.sub(lambda name: self.met[name[0]], line))
            before, interrupted, after = shown.partition("^C\n")
            printed = await self.printed_by_command(PROGRAMS[program], arguments, before if interrupted else None)
            self.compare(block.line, before + after, printed)

    async def printed_by_command(self, program: Sequence[str], arguments: Sequence[str], until: str | None) -> str:
        """What a command prints; with `until` it gets Ctrl-C as soon as it has printed that."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *program,
            *arguments,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert process.stdout is not None
        printed = b""
        try:
            async with asyncio.timeout(PATIENCE):
                while until is not None:
                    printed += (one := await process.stdout.readline())
                    if not one or is_as_shown(until, printed.decode(), {}):
                        break
                if until is not None and process.returncode is None:
                    process.send_signal(signal.SIGINT)
                printed += await process.stdout.read()
                await process.wait()
        except TimeoutError:
            printed += f"(and it still runs after {PATIENCE:g} s)".encode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return printed.decode()

    async def let_go(self) -> None:
        """Leave no connection: SQLite's threads would outlive the loop."""
        from whereupon import EventBus

        modules = [self.module, *(sys.modules.get(name.removesuffix(".py")) for name in self.files)]
        found = [value for module in modules if module is not None for value in vars(module).values()]
        for bus in {id(bus): bus for bus in found if isinstance(bus, EventBus)}.values():
            await bus.engine.dispose()


def titles_of(blocks: list[Block]) -> list[str]:
    """The chapters that have something to run."""
    return list(dict.fromkeys(block.chapter for block in blocks if block.file is None))


def main(page: str, title: str) -> int:
    sys.path.insert(0, os.getcwd())
    chapter = Chapter(blocks_of(Path(page).read_text(encoding="utf-8")), title)
    chapter.write_files()
    problems = asyncio.run(chapter.run())
    print("\n\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
