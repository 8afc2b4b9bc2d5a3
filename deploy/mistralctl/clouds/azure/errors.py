"""How Azure refuses: Resource Manager, common deployment errors."""

from mistralctl.clouds import Errors

ERRORS = Errors(
    codes={
        "SkuNotAvailable": "capacity",
        "ZonalAllocationFailed": "capacity",
        "AllocationFailed": "capacity",
        "OverconstrainedAllocationRequest": "capacity",
        "QuotaExceeded": "quota",
        "OperationNotAllowed": "quota",
        "AuthorizationFailed": "permission",
        "ReadOnlyDisabledSubscription": "permission",
        "InvalidAuthenticationToken": "credentials",
        "ExpiredAuthenticationToken": "credentials",
        "MissingSubscriptionRegistration": "registration",
        "TooManyRequests": "other",
    },
    numbered=r"AADSTS\d+",  # Entra's, where users sign in
    quotas=(r"approved ([\w ]+?) Cores quota",),
    operations=(r"perform action[:\s]+'?([\w:./]+)",),
    # Its words, and those of its libraries, which try to register a resource provider that is missing and say how that went.
    provider=r"(?:not registered to use namespace|Resource provider) '([\w.]+)'",
    unregistered="MissingSubscriptionRegistration",
    register="az provider register -n {provider} --wait",
    registered="Registration succeeded.",
)
