"""What the status of an HTTP answer means to us."""

from __future__ import annotations

from .errors import Kind, WeightsError

LET_IT_BE = "wait until nobody writes there any more, then run this again"


def changed(what: str) -> WeightsError:
    """The error for an object that is not of the version that was to be replaced."""
    return WeightsError(Kind.CHANGED, f"{what} was changed by somebody else meanwhile; read it and try again")


def too_large(what: str, most: int) -> WeightsError:
    """The error for an object that is no small one."""
    return WeightsError(Kind.REFUSED, f"{what} has more than {most} bytes; name another object")


def meaning(status: int, what: str, right: str, retry_after: str | None = None) -> WeightsError:
    """The error for `status` on reading or writing `what`; `right` is what a refused user needs."""
    if status in (401, 403):
        return WeightsError(Kind.DENIED, f"{what} may not be used ({status}); {right}")
    if status in (404, 410):
        return WeightsError(Kind.NOT_FOUND, f"{what} is not there ({status}); check its name")
    if status in (412, 416):
        return WeightsError(Kind.CHANGED, f"{what} changed while it was read ({status}); {LET_IT_BE}")
    wait = float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else 0.0
    if status in (408, 425, 429) or status >= 500:
        busy = "is asked too often" if status == 429 else "is not answered by its server"
        return WeightsError(Kind.UNREACHABLE, f"{what} {busy} ({status}); try again later", retry_after=wait)
    return WeightsError(Kind.UNREACHABLE, f"{what}: the server answered {status}; check the address and its endpoint")
