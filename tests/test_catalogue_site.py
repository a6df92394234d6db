"""The catalogue as pages: they need nothing else, show everything, and run nothing that an event says of itself."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from whereupon import AuditEventHandler, Delivery, DomainEvent, InMemoryEventBus, NotSecret, Workflow
from whereupon.catalogue import Catalogue, CatalogueError

pytestmark = pytest.mark.unit

HOSTILE = """</p><script>alert("docs")</script><img src=x onerror=alert(1)> & 'quotes' "both"
</script><style>*{display:none}</style> javascript:alert(1) ]]> <!-- {{ 7*7 }}"""


class LetterSent(DomainEvent, category="post & <b>parcels</b>", resource="letter", audit="SENT"):
    __doc__ = HOSTILE

    letter_id: str
    text: Annotated[str, msgspec.Meta(description=HOSTILE, examples=[HOSTILE])] = HOSTILE
    stamp_pin: Annotated[str, NotSecret(HOSTILE)] = ""


class LetterReturned(DomainEvent, name='"><script>alert("name")</script>', aliases=("<i>LetterBack</i>",)):
    letter_id: str


class LetterForwardingAttempted(DomainEvent):
    letter_id: str


class LetterForwardingSucceeded(DomainEvent):
    letter_id: str


class LetterForwardingFailed(DomainEvent):
    letter_id: str
    reason: str


LetterForwarding = Workflow(
    LetterForwardingAttempted, LetterForwardingSucceeded, LetterForwardingFailed, name="<u>Forwarding</u>"
)


async def carry(event: DomainEvent) -> None: ...


carry.__doc__ = HOSTILE


def the_catalogue() -> Catalogue:
    bus = InMemoryEventBus()
    bus.register(AuditEventHandler())
    bus.subscribe(
        LetterSent, carry, name='<script>alert("handler")</script>', ordered_by="letter_id", timeout=None, within="90s"
    )
    bus.subscribe(LetterReturned, carry, name="nudge", delivery=Delivery.AFTER_COMMIT)
    return Catalogue.of(bus, title="<em>Post</em>", packages=[__name__])


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, and text."""

    VOID = ("meta", "input", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, Mapping[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[Mapping[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag not in ("style", "script"))


SITE = the_catalogue().site()
PAGES = {name: Page(text) for name, text in SITE.items()}
SENT = PAGES["event-LetterSent.html"]


@pytest.mark.parametrize("name", SITE)
def test_what_an_event_says_of_itself_is_text_and_runs_nowhere(name: str) -> None:
    page = PAGES[name]
    assert page.open == []
    assert len(page.all("script")) == (1 if name == "index.html" else 0)
    assert {"img", "b", "i", "u", "em"}.isdisjoint(tag for tag, _ in page.elements)
    assert len(page.all("style")) == 1
    for _, attributes in page.elements:
        assert not any(key.startswith("on") or key == "style" for key in attributes)
    assert not any("alert(" in data for tag, data in page.texts if tag in ("script", "style"))


def test_what_an_event_says_of_itself_is_shown_as_it_was_written() -> None:
    assert HOSTILE in SENT.text
    assert f"No secret: {HOSTILE}" in SENT.text
    assert '<script>alert("handler")</script>' in SENT.text
    index = PAGES["index.html"].text
    assert '"><script>alert("name")</script>' in index
    assert "post & <b>parcels</b>" in index


@pytest.mark.parametrize("name", SITE)
def test_a_page_needs_nothing_but_itself(name: str) -> None:
    page = PAGES[name]
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        if (target := attributes.get("href")) is not None:
            assert target in SITE or target == "#content", target
    assert "url(" not in SITE[name].partition("</style>")[0]
    assert "@import" not in SITE[name]


@pytest.mark.parametrize("name", SITE)
def test_the_policy_of_a_page_allows_its_own_style_and_script_and_no_other(name: str) -> None:
    page = PAGES[name]
    [policy] = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        for inside in re.findall(rf"<{tag}>(.*?)</{tag}>", SITE[name], re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_of_an_event_tells_all_there_is_to_know() -> None:
    for told in (
        "letter_id",
        "required",
        "SENT",
        "letter",
        "AuditEventHandler",
        "durable",
        "by letter_id",
        "10 attempts",
        "within 90 s",
    ):
        assert told in SENT.text, told
    returned = PAGES[next(name for name in SITE if "script" in name)].text
    assert "version 1; before as <i>LetterBack</i>" in returned
    assert "after commit" in returned
    failed = PAGES["event-LetterForwardingFailed.html"]
    assert "<u>Forwarding</u>" in failed.text
    assert {"event-LetterForwardingAttempted.html", "event-LetterForwardingSucceeded.html"} <= {
        attributes.get("href") for attributes in failed.all("a")
    }


def test_every_event_has_a_page_and_the_index_leads_to_all_of_them() -> None:
    reached = {attributes.get("href") for attributes in PAGES["index.html"].all("a")}
    pages = {name for name in SITE if name.startswith("event-")}
    assert len(pages) == 5
    assert pages <= reached
    assert pages <= {attributes.get("href") for attributes in PAGES["map.html"].all("a")}


def test_a_search_finds_an_event_by_its_fields_handlers_and_aliases() -> None:
    words = {str(attributes.get("data-words")) for attributes in PAGES["index.html"].all("li")}
    assert any("letter_id" in one and "auditeventhandler" in one and "sent" in one for one in words)
    assert any("<i>letterback</i>" in one for one in words)


@pytest.mark.parametrize("name", SITE)
def test_pages_can_be_used_by_keyboard_and_read_aloud(name: str) -> None:
    page = PAGES[name]
    assert page.all("html")[0].get("lang") == "en"
    assert page.all("main")[0].get("id") == "content"
    assert page.all("a")[0].get("href") == "#content"
    assert len(page.all("h1")) == 1
    labels = {attributes.get("for") for attributes in page.all("label")}
    assert all(attributes.get("id") in labels for attributes in page.all("input"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert all(attributes.get("aria-label") for attributes in page.all("svg"))


def test_a_line_of_the_map_shows_how_it_is_delivered() -> None:
    classes = [attributes.get("class") for attributes in PAGES["map.html"].all("path")]
    assert sorted(map(str, classes)) == ["after_commit", "durable"]


def test_names_that_differ_in_case_only_have_files_that_do_not() -> None:
    def named(name: str) -> type[DomainEvent]:
        class LetterStamped(DomainEvent, name=name):
            pass

        return LetterStamped

    bus = InMemoryEventBus()
    for name in ("stamped", "Stamped"):
        bus.subscribe(named(name), carry, name=f"carry {name}")
    files = [name.casefold() for name in Catalogue.of(bus, packages=[]).site()]
    assert len(files) == len(set(files)) == 4


# --- a folder -------------------------------------------------------------------------------------------------------


def test_pages_are_written_into_a_new_folder_and_again_into_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "events"
    written = the_catalogue().write_site(folder)
    assert {path.name for path in written} == {".whereupon-catalogue", *SITE} == set(os.listdir(folder))
    before = {path.name: path.read_bytes() for path in written}
    the_catalogue().write_site(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_page_of_an_event_that_is_gone_goes_and_what_others_put_there_stays(tmp_path: Path) -> None:
    the_catalogue().write_site(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    Catalogue.of(InMemoryEventBus(), packages=[]).write_site(tmp_path)
    assert set(os.listdir(tmp_path)) == {".whereupon-catalogue", "index.html", "map.html", "notes.txt"}


def test_a_list_of_files_that_names_others_deletes_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "outside.html").write_text("mine")
    folder = tmp_path / "site"
    the_catalogue().write_site(folder)
    (folder / "readme.html").write_text("mine")
    with (folder / ".whereupon-catalogue").open("a") as listing:
        listing.write("../outside.html\nreadme.html\nevent-../../outside.html\n")
    the_catalogue().write_site(folder)
    assert (tmp_path / "outside.html").exists()
    assert (folder / "readme.html").exists()


def test_a_folder_of_somebody_else_s_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.html").write_text("mine")
    with pytest.raises(CatalogueError, match="holds files that are no catalogue's"):
        the_catalogue().write_site(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.html"]
    with pytest.raises(CatalogueError, match="is a file"):
        the_catalogue().write_site(tmp_path / "thesis.html")


def test_an_empty_folder_may_be_written(tmp_path: Path) -> None:
    the_catalogue().write_site(tmp_path)
    assert html.escape("<em>Post</em>") in (tmp_path / "index.html").read_text(encoding="utf-8")
