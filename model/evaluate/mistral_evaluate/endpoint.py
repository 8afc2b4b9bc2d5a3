"""Completions of a guarded server: as many at a time as it takes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

from mistral_evaluate.errors import EvaluateError
from mistral_evaluate.job import Address

Body = dict[str, Any]
READ_SECONDS = 900.0  # of one answer
PAUSES = (1, 2, 4, 8, 16, 32)  # seconds between the tries of a request that had no answer
LONGEST_WAIT = 900  # seconds that a server may ask to wait


class Endpoint:
    """A server's completions. `sent` counts requests as they went out, `refused` those that had to come again later (429)."""

    def __init__(self, address: Address, most: int) -> None:
        self.address, self.most = address, most
        self.limit = float(most)  # how many are asked at a time: halved by a 429, one more after each round of answers
        self.sent = self.refused = 0

    def _client(self) -> httpx.AsyncClient:
        async def expect(request: httpx.Request) -> None:
            if self.address.host:
                request.extensions["sni_hostname"] = self.address.host

        trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusted.minimum_version = ssl.TLSVersion.TLSv1_2
        trusted.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if self.address.certificate:
            trusted.load_verify_locations(self.address.certificate)
        return httpx.AsyncClient(
            base_url=self.address.url, headers={"Authorization": f"Bearer {self.address.key}"}, trust_env=False, verify=trusted,
            timeout=httpx.Timeout(READ_SECONDS, connect=30), event_hooks={"request": [expect]},
            limits=httpx.Limits(max_connections=self.most, max_keepalive_connections=self.most),
        )  # fmt: skip

    def ask(self, bodies: Sequence[Body], heard: Callable[[int, Any], None]) -> None:
        """Ask all and tell `heard` of each answer, with the number of its body, as it comes; EvaluateError if one cannot be had."""
        asyncio.run(self._ask(iter(enumerate(bodies)), min(self.most, len(bodies)), heard))

    async def _ask(self, bodies: Iterator[tuple[int, Body]], workers: int, heard: Callable[[int, Any], None]) -> None:
        at_work = 0
        changed = asyncio.Condition()

        def has_place() -> bool:
            return at_work < max(1, int(self.limit))

        async def work() -> None:
            nonlocal at_work
            for number, body in bodies:
                async with changed:
                    await changed.wait_for(has_place)
                    at_work += 1
                try:
                    heard(number, await self._answer(client, body))
                finally:
                    async with changed:
                        at_work -= 1
                        changed.notify_all()

        async with self._client() as client:
            tasks = [asyncio.create_task(work()) for _ in range(workers)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, client: httpx.AsyncClient, body: Body) -> Any:
        tries = 0
        while True:
            self.sent += 1
            try:
                answer = await client.post("/v1/completions", json={"model": self.address.model, **body})
            except httpx.TransportError as error:
                why = str(error) or type(error).__name__
                if "CERTIFICATE_VERIFY_FAILED" in why:
                    raise EvaluateError(
                        f"the server shows another certificate than the deployment's ({why}); nothing was sent"
                    ) from None
            else:
                if answer.status_code == 200:
                    self.limit = min(self.most, self.limit + 1 / self.limit)
                    return answer.json()
                why = _reason(answer)
                if answer.status_code == 429:
                    await self._later(answer, why)
                    continue
                if answer.status_code < 500:
                    raise EvaluateError(f"the server refused a request ({answer.status_code}): {why}")
            if tries == len(PAUSES):
                raise EvaluateError(
                    f"the server does not answer ({why}); when it is up again, the same command asks only the rest"
                )
            await asyncio.sleep(PAUSES[tries])
            tries += 1

    async def _later(self, answer: httpx.Response, why: str) -> None:
        """Wait as long as the server asks for, and ask for less at a time."""
        self.refused += 1
        given = answer.headers.get("retry-after", "")
        seconds = int(given) if given.isdigit() else 1
        if seconds > LONGEST_WAIT:
            raise EvaluateError(f"the server takes no more for {seconds} s: {why}; later the same command asks only the rest")
        self.limit = max(1.0, self.limit / 2)
        await asyncio.sleep(seconds)


def _reason(answer: httpx.Response) -> str:
    """Return what a server says of a refusal."""
    try:
        return str(answer.json()["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]
