"""The start page, and a page for each person with their switches."""

from contextlib import suppress
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from dashtam_sandbox_bank import control
from dashtam_sandbox_bank.bank import Bank
from dashtam_sandbox_bank.faults import LIES, PLACES, STATUSES, Fault, FaultOrLie, Lie
from dashtam_sandbox_bank.pages import Pages
from dashtam_sandbox_bank.parameters import Parameters, UnreadableParameters
from dashtam_sandbox_bank.people import Person
from dashtam_sandbox_bank.refusals import Refused, what_is_wrong

_WHAT: TypeAdapter[Fault | Lie] = TypeAdapter(FaultOrLie)


def start_routes(bank: Bank, pages: Pages) -> APIRouter:
    routes = APIRouter(include_in_schema=False)

    def find(request: Request, name: str) -> Person | Response:
        try:
            return bank.people.find(name)
        except Refused as refused:
            return pages.show(request, "refused.html.jinja", refused.status, reason=refused.description)

    def show(request: Request, person: Person, status: int = 200, problem: str | None = None) -> Response:
        return pages.show(
            request,
            "person.html.jinja",
            status,
            purpose=f"person {person.name}",
            person=control.show_person(bank, person),
            on=[in_words(what) for what in bank.faults.of(person.name)],
            places=PLACES,
            statuses=STATUSES,
            lies=LIES,
            problem=problem,
        )

    @routes.get("/")
    async def start(request: Request) -> Response:
        people = [(person, len(bank.faults.of(person.name))) for person in bank.people]
        return pages.show(request, "start.html.jinja", people=people, settings=bank.settings)

    @routes.get("/people/{name}")
    async def show_one(request: Request, name: str) -> Response:
        person = find(request, name)
        return person if isinstance(person, Response) else show(request, person)

    @routes.post("/people/{name}")
    async def switch(request: Request, name: str) -> Response:
        person = find(request, name)
        if isinstance(person, Response):
            return person
        try:
            form = await Parameters.of_form(request)
        except UnreadableParameters as error:
            return show(request, person, 400, str(error))
        if not pages.seals.holds(request, f"person {person.name}", form.get("seal")):
            return show(request, person, 403, "This page was open for too long. Please try again.")
        try:
            _do(bank, person, form)
        except Refused as refused:
            return show(request, person, refused.status, refused.description)
        except ValidationError as error:
            return show(request, person, 422, what_is_wrong(error))
        return RedirectResponse(f"/people/{quote(person.name, safe='')}", 303)

    return routes


def _do(bank: Bank, person: Person, form: Parameters) -> None:
    match form.get("do"):
        case "fault":
            names = ("at", "status", "retry_after", "delay_seconds", "times")
            bank.faults.put(person.name, _WHAT.validate_python(_filled_in(form, names)))
        case "lie":
            bank.faults.put(person.name, _WHAT.validate_python(_filled_in(form, ("lie", "times"))))
        case "end":
            bank.faults.end(person.name)
        case "expire-refresh":
            control.expire(bank, person, "refresh")
        case "expire-access":
            control.expire(bank, person, "access")
        case "revoke":
            control.revoke(bank, person)
        case "act":
            person.act(3)
        case "open":
            person.open()
        case "close":
            person.close(form.get("account_id") or "")
        case _:
            raise Refused(400, "unknown_button", "Press one of the buttons of this page.")


def _filled_in(form: Parameters, names: tuple[str, ...]) -> dict[str, Any]:
    """What was filled in, with numbers as numbers."""
    found: dict[str, Any] = {}
    for name in names:
        if (text := form.get(name)) is None:
            continue
        found[name] = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text
    if isinstance(delay := found.get("delay_seconds"), str):
        with suppress(ValueError):  # its validation says what is wrong with it
            found["delay_seconds"] = float(delay)
    return found


def in_words(what: Fault | Lie) -> str:
    often = "until it is ended" if what.times is None else "once" if what.times == 1 else f"{what.times} times"
    if isinstance(what, Lie):
        return f"lies: {what.lie.replace('_', ' ')}, {often}"
    parts = [f"{what.at}:"]
    if what.delay_seconds:
        parts.append(f"{what.delay_seconds:g} s late,")
    if what.status is not None:
        parts.append(f"answers {what.status},")
    if what.retry_after is not None:
        parts.append(f"Retry-After {what.retry_after} s,")
    return " ".join([*parts, often])
