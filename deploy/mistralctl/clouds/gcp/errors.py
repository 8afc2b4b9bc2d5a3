"""How GCP refuses: Compute Engine, error messages."""

from mistralctl.clouds import Errors

ERRORS = Errors(
    codes={
        "ZONE_RESOURCE_POOL_EXHAUSTED": "capacity",
        "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS": "capacity",
        "UNSUPPORTED_OPERATION": "capacity",
        "insufficientCapacity": "capacity",
        "QUOTA_EXCEEDED": "quota",
        "quotaExceeded": "quota",
        "PERMISSION_DENIED": "permission",
        "forbidden": "permission",
        "accessNotConfigured": "permission",
        "invalid_grant": "credentials",
        "rateLimitExceeded": "other",
    },
    zone=r"[a-z]+-[a-z]+\d+-[a-f]",
    region=r"[a-z]+-[a-z]+\d+",
    quotas=(r"[Qq]uota '([A-Za-z0-9_-]+)'", r"'([A-Z0-9_]+_CPUS|[A-Z0-9_]*GPUS[A-Z0-9_-]*)'"),
    operations=(r"Required '([\w.]+)' permission",),
)
