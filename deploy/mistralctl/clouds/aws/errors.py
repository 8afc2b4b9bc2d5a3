"""How AWS refuses: API reference of EC2, error codes."""

from mistralctl.clouds import Errors

ERRORS = Errors(
    codes={
        "InsufficientInstanceCapacity": "capacity",
        "InsufficientHostCapacity": "capacity",
        "SpotMaxPriceTooLow": "capacity",
        "Unsupported": "capacity",
        "VcpuLimitExceeded": "quota",
        "MaxSpotInstanceCountExceeded": "quota",
        "InstanceLimitExceeded": "quota",
        "UnauthorizedOperation": "permission",
        "AccessDenied": "permission",
        "AuthFailure": "credentials",
        "InvalidClientTokenId": "credentials",
        "SignatureDoesNotMatch": "credentials",
        "ExpiredToken": "credentials",
        "ExpiredTokenException": "credentials",
        "RequestExpired": "credentials",
    },
    zone=r"[a-z]{2}(?:-gov)?-[a-z]+-\d[a-z]",
    region=r"[a-z]{2}(?:-gov)?-[a-z]+-\d",
    operations=(r"calling the (\w+) operation", r"perform:\s+'?([\w:./]+)"),
)
