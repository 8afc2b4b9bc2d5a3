"""How Azure refuses, by its documentation."""

from __future__ import annotations


class Refused(Exception):
    """An error of Azure: HTTP's status, its code, its words."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message

    def document(self) -> dict[str, dict[str, str]]:
        return {"error": {"code": self.code, "message": self.message}}


def _quota(family: str) -> Refused:
    """More cores than the subscription may have; told as a conflict."""
    return Refused(409, "OperationNotAllowed", (
        f"Operation could not be completed as it results in exceeding approved {family} Cores quota. Additional details - Deployment "
        "Model: Resource Manager, Location: {region}, Current Limit: 0, Current Usage: 0, Additional Required: 4, (Minimum) New Limit "
        "Required: 4. Submit a request for Quota increase at https://aka.ms/ProdportalCRP/ by specifying parameters listed in the "
        "'Details' section for deployment to succeed."
    ))  # fmt: skip


# Refusals of a launch by kind of fault; the second is a spot machine's. Whether Azure says so at once or only when the operation ends.
LAUNCH: dict[str, tuple[tuple[bool, Refused], tuple[bool, Refused]]] = {
    "capacity": (
        (False, Refused(409, "AllocationFailed", (
            "Allocation failed. We do not have sufficient capacity for the requested VM size in this region. Read more about improving "
            "likelihood of allocation success at https://aka.ms/allocation-guidance"
        ))),
        (True, Refused(409, "SkuNotAvailable", (
            "The requested VM size for resource 'Following SKUs have failed for Capacity Restrictions: {type}' is currently not available "
            "in location '{region}'. Please try another size or deploy to a different location or different zone. See "
            "https://aka.ms/azureskunotavailable for details."
        ))),
    ),
    "quota": (
        (True, _quota("{family}")),
        (True, _quota("LowPriorityCores")),
    ),
    "price": (
        (False, Refused(409, "OverconstrainedAllocationRequest", "The maximum price is below the current spot price of {type}.")),
    ) * 2,
}  # fmt: skip

THROTTLED = Refused(429, "TooManyRequests", "The request is being throttled as the limit has been reached for operation type.")
BAD_TOKEN = Refused(401, "InvalidAuthenticationToken", "The access token is invalid.")
EXPIRED_TOKEN = Refused(401, "ExpiredAuthenticationToken", "The access token expiry UTC time is earlier than current UTC time.")
NO_TOKEN = Refused(401, "AuthenticationFailed", "Authentication failed. The 'Authorization' header is missing.")


def unregistered(namespace: str) -> Refused:
    """A resource provider that the subscription has not registered, as
    https://learn.microsoft.com/azure/azure-resource-manager/troubleshooting/error-register-resource-provider words it."""
    return Refused(409, "MissingSubscriptionRegistration", (
        f"The subscription is not registered to use namespace '{namespace}'. See https://aka.ms/rps-not-found for how to register "
        "subscriptions."
    ))  # fmt: skip


def forbidden(who: str, action: str, scope: str) -> Refused:
    """An identity without that right."""
    return Refused(403, "AuthorizationFailed", (
        f"The client '{who}' with object id '{who}' does not have authorization to perform action '{action}' over scope '{scope}' or "
        "the scope is invalid. If access was recently granted, please refresh your credentials."
    ))  # fmt: skip
