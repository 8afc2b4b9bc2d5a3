"""Who asks, and what they may: tokens that this cloud signed, roles at scopes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from simcloud.arm.errors import BAD_TOKEN, EXPIRED_TOKEN, NO_TOKEN, Refused

SUBSCRIPTION = "00000000-0000-4000-8000-000000000001"
TENANT = "00000000-0000-4000-8000-0000000000aa"
LAPTOP = "00000000-0000-4000-8000-0000000000bb"
REFRESH_TOKEN = "refresh-token-of-the-laptop"  # noqa: S105 - it opens nothing but this cloud
ARM = ("https://management.core.windows.net", "https://management.azure.com")
STORAGE = ("https://storage.azure.com",)
TOKEN_SECONDS = 86400

# Azure's built-in roles, by their ids in every subscription.
OWNER = "8e3af657-a8ff-443c-a75c-2fe8c4bcb635"
CONTRIBUTOR = "b24988ac-6180-42a0-ab88-20f7382dd24c"
BLOB_READER = "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1"
BLOB_CONTRIBUTOR = "ba92f5b4-2d11-453d-a403-e96b0029c9fe"


def _blobs(action: str) -> bool:
    return "/blobs/" in action


ROLES: dict[str, Callable[[str], bool]] = {
    OWNER: lambda action: not _blobs(action),
    CONTRIBUTOR: lambda action: (
        not _blobs(action) and (action.endswith("/read") or not action.startswith("microsoft.authorization/"))
    ),
    BLOB_READER: lambda action: action.endswith("/blobs/read"),
    BLOB_CONTRIBUTOR: _blobs,
}


@dataclass(frozen=True)
class Grant:
    """A role of a principal, at a scope and below it."""

    principal: str
    role: str
    scope: str

    def allows(self, principal: str, action: str, scope: str) -> bool:
        below = f"{scope.rstrip('/')}/".lower().startswith(f"{self.scope.rstrip('/')}/".lower())
        return self.principal == principal and below and ROLES[self.role](action.lower())


class Tokens:
    """Access tokens as Azure makes them, signed with a key of this cloud's own."""

    def __init__(self) -> None:
        self.key = secrets.token_hex(32)

    def make(self, principal: str, audience: str, **claims: Any) -> str:
        import jwt

        now = int(time.time())
        facts = {"oid": principal, "tid": TENANT, "aud": audience.rstrip("/"), "iat": now, "exp": now + TOKEN_SECONDS} | claims
        return jwt.encode(facts, self.key, algorithm="HS256")

    def whose(self, authorization: str | None, audiences: Iterable[str]) -> str:
        """The principal that a header names; Refused if it is not one of ours, out of date, or for another service."""
        import jwt

        scheme, _, token = (authorization or "").partition(" ")
        if scheme != "Bearer":
            raise NO_TOKEN
        try:
            return str(jwt.decode(token, self.key, algorithms=["HS256"], audience=list(audiences))["oid"])
        except jwt.ExpiredSignatureError:
            raise EXPIRED_TOKEN from None
        except jwt.InvalidTokenError:
            raise BAD_TOKEN from None


def login(tokens: Tokens, path: str, form: dict[str, str], expired: bool) -> dict[str, Any]:
    """login.microsoftonline.com: what MSAL asks before a token, and a token for the laptop's refresh token."""
    base = "https://login.microsoftonline.com"
    tenant, _, rest = path.strip("/").partition("/")
    if rest == "discovery/instance":
        names = ["login.microsoftonline.com", "login.windows.net", "login.microsoft.com", "sts.windows.net"]
        return {
            "tenant_discovery_endpoint": f"{base}/{TENANT}/v2.0/.well-known/openid-configuration", "api-version": "1.1",
            "metadata": [{"preferred_network": names[0], "preferred_cache": names[1], "aliases": names}],
        }  # fmt: skip
    if rest.endswith("openid-configuration"):
        own = f"{base}/{tenant}"
        return {
            "issuer": f"{own}/v2.0", "authorization_endpoint": f"{own}/oauth2/v2.0/authorize", "token_endpoint": f"{own}/oauth2/v2.0/token",
            "device_authorization_endpoint": f"{own}/oauth2/v2.0/devicecode",
        }  # fmt: skip
    if not rest.endswith("/token"):
        raise Refused(404, "NotFound", path)
    if expired or form.get("refresh_token") != REFRESH_TOKEN:
        code = 700082 if expired else 70000
        return {
            "error": "invalid_grant", "error_codes": [code],
            "error_description": f"AADSTS{code}: The refresh token has expired due to inactivity. Run az login again.",
        }  # fmt: skip
    scope = next(one for one in form["scope"].split() if one.endswith("/.default"))
    audience = scope.removesuffix("/.default")
    return {
        "token_type": "Bearer", "scope": scope, "expires_in": TOKEN_SECONDS, "ext_expires_in": TOKEN_SECONDS, "foci": "1",
        "access_token": tokens.make(LAPTOP, audience), "refresh_token": REFRESH_TOKEN,
    }  # fmt: skip
