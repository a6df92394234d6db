"""FastAPI and Starlette applications with a bus: real applications on real databases."""

import asyncio
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, HTTPException, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from tests.notebook import until
from whereupon import BusStateError, DomainEvent, EventBus, EventContext, InMemoryEventBus, acting_as, request_metadata
from whereupon.asgi import Application, Scope
from whereupon.fastapi import Bus, bus_of, in_transaction, install
from whereupon.schema import log

pytestmark = pytest.mark.integration

PROXY = ("10.0.0.1", 5000)
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class BookShelved(DomainEvent):
    book: int


class Library:
    """A bus with a table of books on shelves, which are checked when a transaction commits."""

    def __init__(self, bus: EventBus) -> None:
        self.bus = bus
        self.sessions = async_sessionmaker(bus.engine, expire_on_commit=False)
        self.heard: list[tuple[int, EventContext]] = []
        bus.subscribe(BookShelved, self.note, name="note")

    async def note(self, event: BookShelved, context: EventContext) -> None:
        self.heard.append((event.book, context))

    @property
    def actors(self) -> dict[int, str | None]:
        return {book: context.actor for book, context in self.heard}

    async def books(self) -> int:
        async with self.sessions() as session:
            return int(await session.scalar(text("SELECT count(*) FROM book")) or 0)

    async def published(self) -> int:
        async with self.sessions() as session:
            return len((await session.execute(select(log.c.position))).all())

    async def shelve(self, book: int) -> None:
        async with self.sessions.begin() as session:
            await self.bus.publish(BookShelved(book=book), session=session)


@pytest.fixture
def library_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(getattr(request, "param", "sqlite_url"))
    return url


on_each_database = pytest.mark.parametrize(
    "library_url", ["sqlite_url", "postgres_url"], indirect=True, ids=["sqlite", "postgresql"]
)


@pytest.fixture
async def library(library_url: str) -> AsyncIterator[Library]:
    bus = EventBus(library_url, create_tables=True)
    async with bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE shelf (id INTEGER PRIMARY KEY)"))
        await connection.execute(text("INSERT INTO shelf VALUES (1)"))
        reference = "shelf_id INTEGER NOT NULL REFERENCES shelf (id) DEFERRABLE INITIALLY DEFERRED"
        await connection.execute(text(f"CREATE TABLE book (id INTEGER PRIMARY KEY, {reference})"))
    yield Library(bus)
    await bus.engine.dispose()


@pytest.fixture
def memory() -> InMemoryEventBus:
    return InMemoryEventBus()


def asking(app: Application, *, client: tuple[str, int] = PROXY) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
    return httpx.AsyncClient(transport=transport, base_url="http://library.example")


@asynccontextmanager
async def running(app: Starlette, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with app.router.lifespan_context(app), asking(app, **options) as http:
        yield http


async def talk(app: Application, path: str, *texts: str) -> list[dict[str, Any]]:
    """What is sent to a WebSocket that says these texts, and goes."""
    said = [{"type": "websocket.receive", "text": each} for each in texts]
    incoming = [{"type": "websocket.connect"}, *said, {"type": "websocket.disconnect", "code": 1000}]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": path, "headers": [], "client": PROXY, "query_string": b"", "subprotocols": []}
    await app(scope, receive, send)
    return sent


class Raised:
    """A handler of exceptions that keeps what reached it."""

    def __init__(self, app: Starlette) -> None:
        self.errors: list[Exception] = []
        app.add_exception_handler(Exception, self.answer)

    async def answer(self, _request: Request, error: Exception) -> Response:
        self.errors.append(error)
        return PlainTextResponse("broken", 500)

    def only(self) -> Exception:
        (error,) = self.errors
        return error


# The bus runs with the application


def fastapi_app(library: Library, **options: Any) -> Starlette:
    app = FastAPI(**options)

    @app.post("/books/{book}")
    async def shelve(book: int, bus: Bus) -> None:
        async with library.sessions.begin() as session:
            await bus.publish(BookShelved(book=book), session=session)

    return app


def starlette_app(library: Library, **options: Any) -> Starlette:
    async def shelve(request: Request) -> Response:
        async with library.sessions.begin() as session:
            await bus_of(request).publish(BookShelved(book=request.path_params["book"]), session=session)
        return Response()

    return Starlette(routes=[Route("/books/{book:int}", shelve, methods=["POST"])], **options)


Making = Callable[..., Starlette]
either = pytest.mark.parametrize("make", [fastapi_app, starlette_app])


@on_each_database
@either
async def test_the_bus_runs_as_long_as_the_application_and_drains_when_it_ends(library: Library, make: Making) -> None:
    app = make(library)
    install(app, library.bus)
    async with running(app) as http:
        assert library.bus.is_running
        assert (await http.post("/books/7")).status_code == 200
    assert not library.bus.is_running
    assert [book for book, _ in library.heard] == [7]


@on_each_database
@either
async def test_what_an_own_lifespan_provides_is_there_from_the_first_handler_to_the_last(
    library: Library, make: Making
) -> None:
    provided: list[str] = []
    seen: list[tuple[int, list[str]]] = []
    states: list[Any] = []

    @asynccontextmanager
    async def own(_: Any) -> AsyncIterator[dict[str, Any]]:
        provided.append("mailer")
        yield {"mailer": "smtp"}
        provided.remove("mailer")

    async def write(event: BookShelved) -> None:
        await asyncio.sleep(0.02)
        seen.append((event.book, list(provided)))

    async def state(request: Request) -> Response:
        states.append(request.state.mailer)
        return Response()

    library.bus.subscribe(BookShelved, write)
    await library.shelve(1)  # left over, say, from a crash
    app = make(library, lifespan=own)
    app.add_route("/state", state)
    install(app, library.bus)
    async with running(app) as http:
        await until(lambda: len(seen) == 1)
        await http.post("/books/2")
    assert seen == [(1, ["mailer"]), (2, ["mailer"])]
    assert provided == []
    async with lifespan_of(app) as given:
        await asking(with_state(app, given)).get("/state")
    assert states == ["smtp"]


@asynccontextmanager
async def lifespan_of(app: Application) -> AsyncIterator[dict[str, Any]]:
    """The lifespan as a server runs it; gives the state for requests."""
    state: dict[str, Any] = {}
    incoming: asyncio.Queue[Any] = asyncio.Queue()
    sent: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.ensure_future(app({"type": "lifespan", "asgi": {}, "state": state}, incoming.get, sent.put))
    await incoming.put({"type": "lifespan.startup"})
    assert await sent.get() == {"type": "lifespan.startup.complete"}
    yield state
    await incoming.put({"type": "lifespan.shutdown"})
    assert await sent.get() == {"type": "lifespan.shutdown.complete"}
    await task


def with_state(app: Application, state: dict[str, Any]) -> Application:
    async def asked(scope: Scope, receive: Any, send: Any) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    return asked


async def test_a_router_s_lifespan_is_around_the_bus_too(library: Library) -> None:
    order: list[str] = []

    @asynccontextmanager
    async def own(_: Any) -> AsyncIterator[None]:
        order.append(f"before the bus: {not library.bus.is_running}")
        yield
        order.append(f"after the bus: {not library.bus.is_running}")

    app = FastAPI()
    app.include_router(APIRouter(lifespan=own))
    install(app, library.bus)
    async with running(app):
        assert library.bus.is_running
    assert order == ["before the bus: True", "after the bus: True"]


async def test_a_lifespan_that_enters_the_bus_itself_has_its_way(library: Library) -> None:
    order: list[bool] = []

    @asynccontextmanager
    async def own(_: Any) -> AsyncIterator[None]:
        async with library.bus:
            yield
            order.append(library.bus.is_running)

    app = fastapi_app(library, lifespan=own)
    install(app, library.bus)
    async with running(app) as http:
        assert (await http.post("/books/7")).status_code == 200
    assert order == [True]
    assert not library.bus.is_running
    assert [book for book, _ in library.heard] == [7]


async def test_a_lifespan_that_fails_leaves_no_bus_running(library: Library) -> None:
    @asynccontextmanager
    async def own(_: Any) -> AsyncIterator[None]:
        yield
        raise LookupError("the mailer is gone")

    app = fastapi_app(library, lifespan=own)
    install(app, library.bus)
    with pytest.raises(LookupError, match="mailer is gone"):
        async with running(app):
            pass
    assert not library.bus.is_running


async def test_an_application_can_be_started_again(library: Library) -> None:
    app = fastapi_app(library)
    install(app, library.bus)
    for book in (1, 2):
        async with running(app) as http:
            assert (await http.post(f"/books/{book}")).status_code == 200
    assert sorted(book for book, _ in library.heard) == [1, 2]


def test_the_test_client_runs_the_bus_on_its_own_loop(sqlite_url: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer ones want another client than httpx, and say so
        from starlette.testclient import TestClient

    library = Library(EventBus(sqlite_url))
    app = fastapi_app(library)
    install(app, library.bus)
    with TestClient(app) as client:
        assert client.post("/books/7").status_code == 200
    assert [book for book, _ in library.heard] == [7]


@pytest.mark.parametrize("inner", [fastapi_app, starlette_app])
@either
async def test_mounted_applications_and_routers_find_the_bus(library: Library, make: Making, inner: Making) -> None:
    app = make(library)
    app.mount("/inner", Starlette(routes=[Mount("/most", inner(library))]))
    install(app, library.bus, trusted_proxies=("10.0.0.0/8",))
    async with running(app) as http:
        answer = await http.post("/inner/most/books/7", headers={"x-forwarded-for": "192.0.2.7"})
        assert answer.status_code == 200
    assert [(book, context.ip_address) for book, context in library.heard] == [(7, "192.0.2.7")]


async def test_a_bus_in_memory_is_run_as_well(memory: InMemoryEventBus) -> None:
    heard: list[int] = []

    @memory.subscribe(BookShelved)
    async def note(event: BookShelved) -> None:
        heard.append(event.book)

    app = FastAPI()
    raised = Raised(app)

    @app.post("/books/{book}")
    async def shelve(book: int, bus: Bus) -> None:
        await bus.publish(BookShelved(book=book))

    @app.get("/session")
    async def use(session: Annotated[AsyncSession, in_transaction()]) -> None: ...

    install(app, memory)
    async with running(app) as http:
        assert (await http.post("/books/7")).status_code == 200
        assert (await http.get("/session")).status_code == 500
    assert heard == [7]
    assert not memory.is_running
    assert "has no database for sessions: write in_transaction(sessions)" in str(raised.only())


# What was forgotten


@either
async def test_an_application_without_a_bus_says_what_to_write(library: Library, make: Making) -> None:
    app = make(library)
    raised = Raised(app)
    async with running(app) as http:
        assert (await http.post("/books/7")).status_code == 500
    assert isinstance(raised.only(), BusStateError)
    assert "this application has no bus: install(app, bus)" in str(raised.only())


@either
async def test_a_lifespan_that_was_not_run_is_told_and_nothing_is_published(library: Library, make: Making) -> None:
    app = make(library)
    raised = Raised(app)
    install(app, library.bus)
    async with asking(app) as http:
        assert (await http.post("/books/7")).status_code == 500
    assert isinstance(raised.only(), BusStateError)
    assert "the application's lifespan was not run" in str(raised.only())
    await library.bus.create_tables()
    assert await library.published() == 0


def test_a_second_bus_is_refused(memory: InMemoryEventBus) -> None:
    app = FastAPI()
    install(app, memory)
    with pytest.raises(ValueError, match=r"has a bus already, so .*make an application in each"):
        install(app, InMemoryEventBus())


def test_what_is_no_application_is_refused(memory: InMemoryEventBus) -> None:
    with pytest.raises(TypeError, match=r"takes the FastAPI or Starlette application itself, not .*APIRouter"):
        install(APIRouter(), memory)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("proxies", ["10.0.0.0/8", ["proxy.local"]])
def test_proxies_that_are_no_networks_are_refused_by_install_and_nothing_is_installed(
    memory: InMemoryEventBus, proxies: Any
) -> None:
    app = FastAPI()
    with pytest.raises(ValueError, match="trusted_proxies"):
        install(app, memory, trusted_proxies=proxies)
    install(app, memory, trusted_proxies=iter(["10.0.0.1"]))


# A transaction for a request


def with_books(transaction: Any) -> FastAPI:
    app = FastAPI()

    @app.post("/shelves/{shelf}/books/{book}", status_code=201)
    async def shelve(
        shelf: int, book: int, bus: Bus, session: Annotated[AsyncSession, transaction], fail: str = ""
    ) -> Any:
        await session.execute(text("INSERT INTO book VALUES (:book, :shelf)"), {"book": book, "shelf": shelf})
        await bus.publish(BookShelved(book=book), session=session)
        if fail == "http":
            raise HTTPException(409, "no room")
        if fail == "error":
            raise LookupError("no room")
        if fail == "response":
            return JSONResponse("no room", 409)
        return book

    return app


@pytest.fixture(params=["of the bus", "given"])
def in_a_transaction(request: pytest.FixtureRequest, library: Library) -> Any:
    return in_transaction() if request.param == "of the bus" else in_transaction(library.sessions)


@on_each_database
async def test_what_an_endpoint_did_is_committed_before_the_response_is_sent(
    library: Library, in_a_transaction: Any
) -> None:
    app = with_books(in_a_transaction)
    install(app, library.bus)
    committed: list[tuple[int, int]] = []

    async def watched(scope: Scope, receive: Any, send: Any) -> None:
        async def look(message: Any) -> None:
            if message["type"] == "http.response.start":
                committed.append((await library.books(), await library.published()))
            await send(message)

        await app(scope, receive, look)

    async with app.router.lifespan_context(app), asking(watched) as http:
        assert (await http.post("/shelves/1/books/7")).status_code == 201
    assert committed == [(1, 1)]
    assert [book for book, _ in library.heard] == [7]


@on_each_database
async def test_a_failed_commit_is_an_error_to_the_client_and_no_event(library: Library, in_a_transaction: Any) -> None:
    app = with_books(in_a_transaction)
    raised = Raised(app)
    install(app, library.bus)
    async with running(app) as http:
        answer = await http.post("/shelves/2/books/7")  # no such shelf: noticed by the commit, not before
        assert (answer.status_code, answer.text) == (500, "broken")
        assert isinstance(raised.only(), IntegrityError)
        assert (await library.books(), await library.published()) == (0, 0)
    assert library.heard == []


async def test_a_failed_commit_may_be_answered_as_the_application_likes(library: Library) -> None:
    app = with_books(in_transaction())

    @app.exception_handler(IntegrityError)
    async def no_shelf(_request: Request, _error: Exception) -> Response:
        return PlainTextResponse("there is no such shelf", 409)

    install(app, library.bus)
    async with running(app) as http:
        assert (await http.post("/shelves/2/books/7")).status_code == 409
    assert library.heard == []


@on_each_database
@pytest.mark.parametrize(("fail", "status", "kept"), [("http", 409, 0), ("error", 500, 0), ("response", 409, 1)])
async def test_what_is_raised_rolls_back_and_what_is_returned_commits(
    library: Library, fail: str, status: int, kept: int
) -> None:
    app = with_books(in_transaction())
    install(app, library.bus)
    async with running(app) as http:
        assert (await http.post("/shelves/1/books/7", params={"fail": fail})).status_code == status
        assert (await library.books(), await library.published()) == (kept, kept)
    assert len(library.heard) == kept


async def test_all_who_ask_in_a_request_get_the_same_session(library: Library) -> None:
    app = FastAPI()
    transaction = in_transaction()
    found: list[AsyncSession] = []

    async def repository(session: Annotated[AsyncSession, transaction]) -> None:
        found.append(session)

    @app.get("/", dependencies=[transaction])
    async def use(session: Annotated[AsyncSession, transaction], _: Annotated[None, Depends(repository)]) -> None:
        found.append(session)

    install(app, library.bus)
    async with running(app) as http:
        for _ in range(2):
            assert (await http.get("/")).status_code == 200
    first, second, third, fourth = found
    assert first is second
    assert third is fourth
    assert first is not third


@on_each_database
async def test_after_the_response_the_session_is_closed_for_good(library: Library) -> None:
    app = FastAPI()
    found: list[Exception] = []

    async def late(session: AsyncSession) -> None:
        try:
            await session.execute(text("INSERT INTO book VALUES (8, 1)"))
        except InvalidRequestError as error:
            found.append(error)

    @app.get("/background")
    async def background(session: Annotated[AsyncSession, in_transaction()], tasks: BackgroundTasks) -> None:
        tasks.add_task(late, session)

    @app.get("/streamed")
    async def streamed(session: Annotated[AsyncSession, in_transaction()]) -> Response:
        async def body() -> AsyncIterator[str]:
            await late(session)
            yield "streamed"

        return StreamingResponse(body())

    install(app, library.bus)
    async with running(app) as http:
        for path in ("/background", "/streamed"):
            assert (await http.get(path)).status_code == 200
    assert ["permanently closed" in str(error) for error in found] == [True, True]


async def test_a_transaction_for_a_whole_websocket_is_refused(library: Library) -> None:
    app = FastAPI()

    @app.websocket("/ws")
    async def connected(socket: WebSocket, session: Annotated[AsyncSession, in_transaction()]) -> None:
        await socket.accept()

    install(app, library.bus)
    async with app.router.lifespan_context(app):
        with pytest.raises(BusStateError, match="Open one for each message"):
            await talk(app, "/ws")


# Who, and from where


async def customer(name: Annotated[str, Header()]) -> None:
    await asyncio.sleep(0)
    acting_as(name)


def sync_customer(name: Annotated[str, Header()]) -> None:
    acting_as(name)  # FastAPI calls this in a thread


async def yielded_customer(name: Annotated[str, Header()]) -> AsyncIterator[None]:
    acting_as(name)
    yield


def sync_yielded_customer(name: Annotated[str, Header()]) -> Iterator[None]:
    acting_as(name)
    yield


async def customer_in_a_block(name: Annotated[str, Header()]) -> AsyncIterator[None]:
    with request_metadata({"actor": name}):
        yield


CUSTOMERS = [customer, sync_customer, yielded_customer, sync_yielded_customer, customer_in_a_block]


@pytest.mark.parametrize("who", CUSTOMERS, ids=lambda who: who.__name__)
async def test_an_actor_known_in_a_dependency_is_on_all_that_the_request_publishes(
    library: Library, who: Callable[..., Any]
) -> None:
    app = FastAPI()
    raised = Raised(app)

    @app.get("/async", dependencies=[Depends(who)])
    async def in_a_coroutine(tasks: BackgroundTasks) -> Response:
        await library.shelve(1)
        tasks.add_task(library.shelve, 2)
        return PlainTextResponse("ok", background=tasks)

    @app.get("/sync", dependencies=[Depends(who)])
    def in_a_thread() -> None:
        asyncio.run_coroutine_threadsafe(library.shelve(3), app.state.loop).result(10)

    @app.get("/streamed", dependencies=[Depends(who)])
    async def streamed() -> Response:
        async def body() -> AsyncIterator[str]:
            await library.shelve(4)
            yield "data: shelved\n\n"

        return StreamingResponse(body(), media_type="text/event-stream")

    install(app, library.bus)
    async with running(app) as http:
        app.state.loop = asyncio.get_running_loop()
        for path in ("/async", "/sync", "/streamed"):
            answer = await http.get(path, headers={"name": "ada"})
            assert answer.status_code == 200, raised.errors
    assert library.actors == dict.fromkeys((1, 2, 3, 4), "ada")
    assert {context.ip_address for _, context in library.heard} == {"10.0.0.1"}


async def test_an_actor_known_inside_a_middleware_s_task_is_known_outside(library: Library) -> None:
    app = starlette_app(library)

    async def note_who(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        acting_as("ada")
        return await proceed(request)

    app.add_middleware(BaseHTTPMiddleware, dispatch=note_who)
    install(app, library.bus)
    async with running(app) as http:
        await http.post("/books/7")
    assert library.actors == {7: "ada"}


async def test_who_is_asked_for_an_actor_is_asked_when_an_event_is_published(library: Library) -> None:
    class Backend(AuthenticationBackend):
        async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
            name = conn.headers.get("name")
            return None if name is None else (AuthCredentials(), SimpleUser(name))

    def actor(connection: HTTPConnection) -> str | None:
        return connection.user.username if connection.user.is_authenticated else None

    app = starlette_app(library, middleware=[Middleware(AuthenticationMiddleware, backend=Backend())])
    install(app, library.bus, actor=actor)  # outside of who finds out
    async with running(app) as http:
        await http.post("/books/1", headers={"name": "ada"})
        await http.post("/books/2")
    assert library.actors == {1: "ada", 2: None}


async def test_acting_as_comes_before_who_is_asked_and_can_be_taken_back(library: Library) -> None:
    app = FastAPI()

    @app.post("/")
    async def shelve(request: Request) -> None:
        await library.shelve(1)
        request.state.user_id = UUID(int=5)
        await library.shelve(2)
        acting_as(6)
        await library.shelve(3)
        with request_metadata({"actor": "cron"}):
            await library.shelve(4)
        acting_as(None)
        await library.shelve(5)

    install(app, library.bus, actor=lambda connection: getattr(connection.state, "user_id", None))
    async with running(app) as http:
        assert (await http.post("/")).status_code == 200
    assert library.actors == {1: None, 2: str(UUID(int=5)), 3: "6", 4: "cron", 5: str(UUID(int=5))}


async def test_what_is_no_id_is_refused_as_an_actor(library: Library) -> None:
    app = fastapi_app(library)
    raised = Raised(app)
    install(app, library.bus, actor=lambda connection: SimpleUser("ada"))  # type: ignore[arg-type,return-value] # pyright: ignore
    async with running(app) as http:
        assert (await http.post("/books/7")).status_code == 500
    assert "an actor is a str, an int or a UUID, not SimpleUser" in str(raised.only())
    assert library.heard == []


async def test_a_websocket_that_logs_in_acts_as_who_it_is_from_then_on(library: Library) -> None:
    app = FastAPI()

    @app.websocket("/ws")
    async def connected(socket: WebSocket, bus: Bus) -> None:
        await socket.accept()
        for book in (1, 2, 3):
            name = await socket.receive_text()
            if name:
                acting_as(name)
            async with library.sessions.begin() as session:
                await bus.publish(BookShelved(book=book), session=session)

    install(app, library.bus)
    async with app.router.lifespan_context(app):
        await talk(app, "/ws", "", "ada", "")
    assert library.actors == {1: None, 2: "ada", 3: "ada"}
    assert {context.ip_address for _, context in library.heard} == {"10.0.0.1"}


async def test_requests_at_once_never_act_as_one_another(library: Library) -> None:
    app = FastAPI()

    @app.post("/{book}", dependencies=[Depends(sync_customer)])
    async def shelve(book: int) -> None:
        await asyncio.sleep(0.001 * (book % 5))
        await library.shelve(book)

    install(app, library.bus)
    async with running(app) as http, asyncio.TaskGroup() as group:
        for book in range(40):
            group.create_task(http.post(f"/{book}", headers={"name": f"reader {book}"}))
    assert library.actors == {book: f"reader {book}" for book in range(40)}


@pytest.mark.parametrize(
    ("peer", "forwarded", "told"),
    [
        (PROXY, "192.0.2.7", "192.0.2.7"),
        (PROXY, "6.6.6.6, 192.0.2.7", "192.0.2.7"),  # what the client wrote itself
        (PROXY, "192.0.2.7, garbage", "10.0.0.1"),
        (("203.0.113.5", 1), "192.0.2.7", "203.0.113.5"),
    ],
)
async def test_an_address_is_believed_from_trusted_proxies_only(
    library: Library, peer: tuple[str, int], forwarded: str, told: str
) -> None:
    app = fastapi_app(library)
    install(app, library.bus, trusted_proxies=("10.0.0.0/8",))
    headers = {"x-forwarded-for": forwarded, "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "user-agent": "curl/8"}
    async with running(app, client=peer) as http:
        await http.post("/books/7", headers=headers)
    ((_, context),) = library.heard
    assert (context.ip_address, context.trace_id, context.user_agent) == (told, TRACE, "curl/8")


NAMES = [b"user-agent", b"x-forwarded-for", b"traceparent", b"x-request-id", b"x-correlation-id", b"forwarded"]


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=50)), max_size=6))
def test_no_header_breaks_a_request_or_what_it_publishes(headers: list[tuple[bytes, bytes]]) -> None:
    async def ask() -> None:
        bus, heard = InMemoryEventBus(), list[EventContext]()

        @bus.subscribe(BookShelved)
        async def note(event: BookShelved, context: EventContext) -> None:
            heard.append(context)

        async def shelve(request: Request) -> Response:
            await bus_of(request).publish(BookShelved(book=1))
            return Response()

        app = Starlette(routes=[Route("/", shelve)])
        install(app, bus, trusted_proxies=("10.0.0.1",))
        async with app.router.lifespan_context(app):
            scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "client": PROXY}
            await app({**scope, "headers": headers}, nothing, nothing)
        assert len(heard) == 1

    asyncio.run(ask())


async def nothing(*_: Any) -> Any:
    return {"type": "http.disconnect"}


# Starlette alone, and real processes

WITHOUT_FASTAPI = """
import asyncio, sys
sys.modules["fastapi"] = None  # as if it was not installed
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from whereupon import DomainEvent, InMemoryEventBus
from whereupon.fastapi import bus_of, install

class PageTurned(DomainEvent): ...

bus = InMemoryEventBus()

@bus.subscribe(PageTurned)
async def note(event: PageTurned) -> None:
    print("heard")

async def turn(request):
    await bus_of(request).publish(PageTurned())
    return Response()

app = Starlette(routes=[Route("/", turn)])
install(app, bus)

async def main():
    async def send(message): ...
    async with app.router.lifespan_context(app):
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "client": None, "headers": []}
        await app(scope, None, send)

asyncio.run(main())
try:
    from whereupon.fastapi import Bus
except ImportError as error:
    print(error.name)
print("sqlalchemy" in sys.modules)
"""


def test_starlette_alone_needs_neither_fastapi_nor_sqlalchemy() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_FASTAPI], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout.split() == ["heard", "fastapi", "False"], ran.stderr


SERVED = """
import os
from contextlib import asynccontextmanager
from typing import Annotated
from fastapi import Depends, FastAPI, Header
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from whereupon import DomainEvent, EventBus, EventContext, acting_as
from whereupon.fastapi import Bus, in_transaction, install

class BookShelved(DomainEvent):
    book: int

bus = EventBus(os.environ["DATABASE"], create_tables=True, poll_interval=0.05)

@bus.subscribe(BookShelved)
async def note(event: BookShelved, context: EventContext, session: AsyncSession) -> None:
    row = {"book": event.book, "who": context.actor, "ip": context.ip_address}
    await session.execute(text("INSERT INTO noted VALUES (:book, :who, :ip)"), row)

@asynccontextmanager
async def lifespan(app):
    async with bus.engine.begin() as connection:
        await connection.execute(text("INSERT INTO process VALUES (:pid)"), {"pid": os.getpid()})
    yield

def reader(name: Annotated[str, Header()]) -> None:
    acting_as(name)

app = FastAPI(lifespan=lifespan)
install(app, bus, trusted_proxies=("127.0.0.1",))

@app.post("/books/{book}", dependencies=[Depends(reader)])
async def shelve(book: int, bus: Bus, session: Annotated[AsyncSession, in_transaction()]) -> None:
    await bus.publish(BookShelved(book=book), session=session)
"""


@contextmanager
def uvicorn_process(folder: Path, port: int, database: str) -> Iterator[subprocess.Popen[str]]:
    (folder / "served.py").write_text(SERVED)
    command = [sys.executable, "-m", "uvicorn", "served:app", f"--port={port}", "--workers=2", "--no-proxy-headers"]
    environment = {**os.environ, "DATABASE": database}
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("library_url", ["postgres_url"], indirect=True)
async def test_a_server_with_several_processes_delivers_each_event_once_and_stops_when_asked_to(
    library: Library, tmp_path: Path, unused_tcp_port: int
) -> None:
    await library.bus.create_tables()
    async with library.bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE process (pid INTEGER)"))
        await connection.execute(text("CREATE TABLE noted (book INTEGER, who TEXT, ip TEXT)"))

    async def rows(statement: str) -> list[Any]:
        async with library.sessions() as session:
            return list(await session.execute(text(statement)))

    async def enough(statement: str, number: int) -> list[Any]:
        async with asyncio.timeout(60):
            while len(found := await rows(statement)) < number:
                assert process.poll() is None, process.communicate()[0]
                await asyncio.sleep(0.05)
        return found

    with uvicorn_process(tmp_path, unused_tcp_port, library.bus.engine.url.render_as_string(False)) as process:
        pids = await enough("SELECT pid FROM process", 2)
        assert len(set(pids)) == 2
        # uvicorn listens once the lifespan has begun, which is a moment after the rows; it is tried anew until then
        transport = httpx.AsyncHTTPTransport(retries=6)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{unused_tcp_port}", transport=transport) as http:
            for book in range(20):
                headers = {"name": f"reader {book}", "x-forwarded-for": f"192.0.2.{book}"}
                assert (await http.post(f"/books/{book}", headers=headers)).status_code == 200
        await enough("SELECT book FROM noted", 20)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    noted = await rows("SELECT book, who, ip FROM noted ORDER BY book")
    assert [tuple(row) for row in noted] == [(book, f"reader {book}", f"192.0.2.{book}") for book in range(20)]
    assert process.returncode in (0, -signal.SIGTERM), output  # uvicorn ends by the signal once it has stopped
    assert "Traceback" not in output, output
