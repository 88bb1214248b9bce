"""The right of one run to an engine that others can reach: a connection that the engine keeps open.

It ends with the run's process, however that ends, and the next run may have the engine then.
"""

from __future__ import annotations

import http.client

from gspo_megatron.rollout.http import Address, said

LEASE, RUN = "/gspo/lease", "X-Run"
"""The route, and the header with the name of the run that asks."""


class Lease:
    """
    Attributes:
        held_by: the run that has the engine, where it is another one; empty otherwise.
    """

    def __init__(self, address: Address, run: str, timeout_s: float) -> None:
        """Asks for it. An engine without the route, which `serve` did not start, lends itself to everyone.

        Raises:
            EngineError: no answer in `timeout_s` seconds, or a status that tells of neither.
        """
        self.held_by = ""
        self._connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
        try:
            self._connection.request("POST", LEASE, headers={**address.headers, RUN: run})
            self._answer = self._connection.getresponse()  # referred to: it has the socket
            if self._answer.status == 200:
                return
            body = self._answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.end()
            raise address.unreachable(error) from error
        self.end()
        if self._answer.status == 409:
            self.held_by = said(body)
        elif self._answer.status != 404:
            raise address.refused(LEASE, self._answer.status, body)

    def end(self) -> None:
        """Gives the engine back."""
        self._connection.close()
        if answer := getattr(self, "_answer", None):
            answer.close()
