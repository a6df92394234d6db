"""No request is larger than we are ready to read."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dashtam.presentation.problems import problem


class BodyLimit:
    """Answers 413 to a body of more than `limit` bytes, whatever its Content-Length says.

    FastAPI's `max_body_size` would do, but for its answer: plain text, where every other error is a problem. The body
    is read before the application is called: what it then answers does not depend on how the body came.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received: list[Message] = []
        size = 0
        while True:
            message = await receive()
            received.append(message)
            size += len(message.get("body", b""))
            if size > self._limit:
                refusal = problem(413, f"A body has {self._limit:,} bytes at most.", headers={"connection": "close"})
                await refusal(scope, receive, send)
                return
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        received.reverse()

        async def replayed() -> Message:
            return received.pop() if received else await receive()

        await self._app(scope, replayed, send)
