"""Connections that ask nothing are closed."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 30.0  # within which a connection's next request has to begin, and an answer has to be taken


class Patient(H11Protocol):
    """uvicorn's HTTP, which waits for ever for the headers of a request, and for clients that do not read."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(SECONDS, self._hang_up, self.cycle)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        self.loop.call_later(SECONDS, self._hang_up, answered)

    def _hang_up(self, last: object) -> None:
        """Close the connection if no request has begun since its `last`, None where there was none."""
        if self.cycle is last:
            self.transport.abort()
