"""What of ours Azure has, by its own API: without SkyPilot's database.

SkyPilot makes a resource group for each machine, named after cluster, user and region; it labels the machine and its disk. `label_others` labels the
group. A group goes as a whole where it was made for that machine and holds nothing else; one that a machine has left is known by its labels.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mistralctl import refusals, state
from mistralctl.clouds import Finding, NotUsed, Part, Refused, ahead, part_by_part, understood
from mistralctl.clouds.azure import CLOUD
from mistralctl.clouds.azure.errors import ERRORS
from mistralctl.clouds.azure.quotas import subscription
from mistralctl.errors import Exit, UserError
from mistralctl.quotas import Unknown

CLUSTER_TAG = "skypilot-cluster-name"
OWN_TAGS = ("mistralctl-owner", "mistralctl-name")
# What SkyPilot 0.14.1 makes a machine of (sky/provision/azure; Microsoft.Authorization is registered in every subscription). Its disks are
# Microsoft.Compute's, and weights lie in a storage account that is there already.
PROVIDERS = ("Microsoft.Compute", "Microsoft.Network", "Microsoft.ManagedIdentity")
TIMEOUTS: dict[str, Any] = {"connection_timeout": 10, "read_timeout": 30}


@contextlib.contextmanager
def _asked() -> Iterator[None]:
    """Azure's errors as one line."""
    try:
        from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError
    except ImportError as error:
        raise NotUsed("Azure's SDK is not installed; pip install 'mistralctl[azure]'", Exit.CLOUD) from error
    try:
        with state.secrets_hidden():  # from the programs that credentials come from
            yield
    except Unknown as error:
        raise NotUsed("nobody is signed in to Azure here; run az login", Exit.CLOUD) from error
    except ClientAuthenticationError as error:
        raise UserError(f"Azure does not accept the sign-in ({_code(error)}); run az login", Exit.CLOUD) from error
    except HttpResponseError as error:
        words = " ".join(str(getattr(error.error, "message", None) or error.message).split())[:300]
        mend = refusals.registering([words]) if _code(error) == ERRORS.unregistered else ""
        raise UserError(f"Azure refused ({_code(error)}): {words}{mend and f'; {mend}'}", Exit.CLOUD) from error
    except AzureError as error:
        raise UserError(f"Azure cannot be asked: {str(error).splitlines()[0][:300]}", Exit.CLOUD) from error


def _code(error: Any) -> str:
    known = getattr(getattr(error, "error", None), "code", None)
    aad = re.search(r"AADSTS\d+", str(error))
    return str(known or (aad and aad[0]) or getattr(error, "status_code", None) or type(error).__name__)


def checks() -> list[Finding]:
    """Whether the subscription has registered the resource providers that machines need, which a new one has not."""
    try:
        with _asked():
            _, resource = _clients()
            states = {name: str(resource.providers.get(name).registration_state) for name in PROVIDERS}
    except UserError as error:
        return [Finding("resource providers", False, str(error), CLOUD.sign_in)]
    missing = [provider for provider, state in states.items() if state != "Registered"]
    found = ", ".join(f"{provider} {state}" for provider, state in states.items() if not missing or provider in missing)
    mend = "; ".join(ERRORS.register.format(provider=provider) for provider in missing)
    return [Finding("resource providers", not missing, found, mend)]


def _every(listed: Iterable[Any]) -> list[Any]:
    """All that Azure lists; nothing where the subscription has not registered the provider, which then has nothing there."""
    from azure.core.exceptions import HttpResponseError

    try:
        return list(listed)
    except HttpResponseError as error:
        if _code(error) != ERRORS.unregistered:
            raise
        return []


def _account() -> tuple[Any, str]:
    """The credential and the subscription, as SkyPilot signs in: those of the Azure CLI."""
    from azure.identity import AzureCliCredential

    return AzureCliCredential(process_timeout=30), subscription()


class _Clock:
    """How far Azure's clock is ahead of this machine's, by its last answer."""

    ahead = 0.0

    def hear(self, answer: Any) -> None:
        """Take the Date of an answer."""
        self.ahead = ahead(answer.http_response.headers.get("Date"))


def _clients(clock: _Clock | None = None) -> tuple[Any, Any]:
    """Those of machines and of groups."""
    from azure.mgmt.resource import ResourceManagementClient

    account = _account()
    return _compute(account, clock), ResourceManagementClient(*account, **TIMEOUTS)


def _compute(account: tuple[Any, str], clock: _Clock | None = None) -> Any:
    from azure.mgmt.compute import ComputeManagementClient

    heard = {"raw_response_hook": clock.hear} if clock else {}
    return ComputeManagementClient(*account, **(TIMEOUTS | heard))


def identity() -> str:
    """The subscription that this laptop works in; UserError if Azure does not take the sign-in (expired, wrong) for it."""
    with _asked():
        _, resource = _clients()
        next(iter(resource.resource_groups.list(top=1)), None)
        return f"subscription {subscription()}"


def account() -> str:
    """The subscription that this laptop works in; NotUsed without a sign-in."""
    with _asked():
        return subscription()


def _is_ours(labels: Mapping[str, str], owner: str | None, name: str | None) -> bool:
    wanted = {"mistralctl-owner": owner, "mistralctl-name": name}
    return "mistralctl-name" in labels and all(value in (None, labels.get(key)) for key, value in wanted.items())


def _group(part_id: str) -> str:
    return part_id.split("/")[4]


def _left_groups(
    resource: Any, whose: tuple[str | None, str | None], held: set[str], clock: _Clock, refused: Refused | None
) -> Iterator[Part]:
    """Groups with our labels and without a machine; of those that are empty nobody knows the age."""

    def left(group: Any) -> Part | None:
        if not _is_ours(group.tags or {}, *whose) or group.name.lower() in held:
            return None
        parts = list(resource.resources.list_by_resource_group(group.name, expand="createdTime"))
        made = [part.created_time.timestamp() for part in parts if part.created_time]
        state = "deleting" if group.properties.provisioning_state == "Deleting" else "left behind"
        size, created = f"{len(parts)} resources", min(made, default=time.time() + clock.ahead)
        return Part("azure", "group", group.id, group.location, state, size, created, dict(group.tags), clock.ahead)

    yield from understood(refused, "group", resource.resource_groups.list(), left)


def _made_for(part: Part) -> bool:
    """Whether the group of a part is the one that SkyPilot made for its machine, and none of the user's own."""
    return part.kind == "group" or _group(part.id) == f"{part.labels.get(CLUSTER_TAG)}-{part.place}"


def _others_in(resource: Any, part: Part) -> list[str]:
    """What the group of a part holds that is neither labelled as the part is nor one of the things that SkyPilot makes beside a machine."""
    begin = ("sky-", f"{_group(part.id).removesuffix(f'-{part.place}')}-")
    found = []
    for one in resource.resources.list_by_resource_group(_group(part.id)):
        tags = one.tags or {}
        ours = all(tags.get(key) == part.labels.get(key) for key in OWN_TAGS)
        beside = not set(OWN_TAGS) & set(tags) and one.type.partition("/")[0] in PROVIDERS and one.name.startswith(begin)
        if not ours and not beside:
            found.append(one.name)
    return found


def _created(one: Any, clock: _Clock) -> float:
    return float(one.time_created.timestamp()) if one.time_created else time.time() + clock.ahead


def _left_disks(compute: Any, whose: tuple[str | None, str | None], clock: _Clock, refused: Refused | None) -> Iterator[Part]:
    """Those without a machine; one that is attached goes with its machine."""

    def left(one: Any) -> Part | None:
        if one.managed_by is not None or not _is_ours(one.tags or {}, *whose):
            return None
        size, state = "" if one.disk_size_gb is None else f"{one.disk_size_gb} GiB", str(one.disk_state).lower()
        return Part("azure", "disk", one.id, one.location, state, size, _created(one, clock), one.tags, clock.ahead)

    yield from understood(refused, "disk", _every(compute.disks.list()), left)


def ours(owner: str | None, name: str | None = None, within: Iterable[str] | None = None) -> list[Part]:
    """What `listed` lists; UserError if anything of it is refused."""
    return listed(owner, name, within, None)


def listed(owner: str | None, name: str | None, within: Iterable[str] | None, refused: Refused | None) -> list[Part]:
    """Machines, disks without one and resource groups that a machine has left, with our labels; UserError if Azure
    refuses. With `refused` that is added there. Where not all machines are known, nobody can say which groups one has left."""
    found: list[Part] = []
    with _asked():
        clock = _Clock()
        compute, resource = _clients(clock)
    every: list[Any] | None = None
    with part_by_part(refused), _asked():
        every = _every(compute.virtual_machines.list_all())
        found += _parts(compute, every, (owner, name), clock, refused)
    with part_by_part(refused), _asked():
        found += _left_disks(compute, (owner, name), clock, refused)
    if every is not None:
        held = {_group(one.id).lower() for one in every}
        with part_by_part(refused), _asked():
            found += _left_groups(resource, (owner, name), held, clock, refused)
    places = None if within is None else set(within)
    return [part for part in found if places is None or part.place in places]


def machines(owner: str | None, within: Iterable[str]) -> list[Part]:
    """The machines of what `ours` lists, in two questions; NotUsed without a sign-in, UserError if Azure refuses."""
    with _asked():
        clock = _Clock()
        compute = _compute(_account(), clock)
        found = _parts(compute, _every(compute.virtual_machines.list_all()), (owner, None), clock)
    places = set(within)
    return [part for part in found if part.place in places]


def _disk_gib(one: Any) -> float | None:
    """What a machine's disks hold, as far as Azure says it with the machine."""
    stored = one.storage_profile
    disks = [stored.os_disk, *(stored.data_disks or ())] if stored and stored.os_disk else []
    sizes = [float(disk.disk_size_gb or 0) for disk in disks]
    return sum(sizes) if sizes and all(sizes) else None


def _parts(
    compute: Any, every: Iterable[Any], whose: tuple[str | None, str | None], clock: _Clock, refused: Refused | None = None
) -> list[Part]:
    """Those of these machines that are of that owner and name, each with its power, for which Azure is asked once."""
    own = [one for one in every if _is_ours(one.tags or {}, *whose)]
    power = _powers(compute) if own else {}

    def machine(one: Any) -> Part:
        state = (
            "deleting" if one.provisioning_state == "Deleting" else power.get(one.id.lower(), str(one.provisioning_state).lower())
        )
        size = one.hardware_profile.vm_size
        return Part(
            "azure", "machine", one.id, one.location, state, size, _created(one, clock), one.tags, clock.ahead, _disk_gib(one)
        )

    return list(understood(refused, "machine", own, machine))


def _powers(compute: Any) -> dict[str, str]:
    """How each machine of the subscription is powered, by its id in small letters; how its making goes as long as it has no power."""
    found = {}
    for one in compute.virtual_machines.list_all(status_only="true"):
        statuses = one.instance_view.statuses if one.instance_view else ()
        codes = dict((status.code or "").split("/", 1) for status in statuses or () if "/" in (status.code or ""))
        found[one.id.lower()] = codes.get("PowerState", codes.get("ProvisioningState", "unknown")).lower()
    return found


def relabel(part: Part, labels: Mapping[str, str]) -> None:
    """Sets these tags of a machine and leaves its others as they are; UserError if Azure refuses."""
    with _asked():
        compute, _ = _clients()
        group, name = _group(part.id), part.id.rpartition("/")[2]
        now = compute.virtual_machines.get(group, name).tags or {}
        compute.virtual_machines.begin_update(group, name, {"tags": now | dict(labels)}).result()


def label_others(owner: str, name: str, region: str) -> int:
    """Labels the resource groups that SkyPilot made for a deployment's machines and that bear no owner; the number of its machines."""
    with _asked():
        from azure.mgmt.resource.resources.models import ResourceGroupPatchable

        _, resource = _clients()
        found = [part for part in machines(owner, [region]) if part.labels["mistralctl-name"] == name]
        for part in found:
            tags = resource.resource_groups.get(_group(part.id)).tags or {} if _made_for(part) else None
            if tags is not None and OWN_TAGS[0] not in tags:
                own = dict(zip(OWN_TAGS, (owner, name), strict=True))
                resource.resource_groups.update(_group(part.id), ResourceGroupPatchable(tags={**tags, **own}))
        return len(found)


def narrow(owner: str, name: str, region: str, port: int, networks: Sequence[str]) -> int:
    """Lets a port of a deployment's machines be reached from these networks alone, by the rule that SkyPilot made for the machine; the
    number of rules for it.

    Its machines have no address of version 6; networks of that version say nothing here. UserError if Azure refuses.
    """
    apart = ipaddress.collapse_addresses(ipaddress.IPv4Network(network) for network in networks if ":" not in network)
    four = [str(network) for network in apart]  # Azure refuses a rule whose networks overlap
    held = 0
    with _asked():
        from azure.mgmt.network import NetworkManagementClient

        client: Any = NetworkManagementClient(*_account(), **TIMEOUTS)
        for machine in ours(owner, name, [region]):
            if machine.kind != "machine":
                continue
            group, cluster = _group(machine.id), machine.labels["ray-cluster-name"]
            for found in client.network_security_groups.list(group):
                rules = [rule for rule in found.security_rules if rule.name.startswith(f"sky-ports-{cluster}-")]
                rules = [
                    rule for rule in rules if str(port) in (rule.destination_port_range, *(rule.destination_port_ranges or ()))
                ]
                for rule in rules:
                    rule.access = "Allow" if four else "Deny"
                    everyone = four in ([], ["0.0.0.0/0"])
                    rule.source_address_prefix, rule.source_address_prefixes = ("*", []) if everyone else (None, four)
                held += len(rules)
                if rules:
                    client.network_security_groups.begin_create_or_update(group, found.name, found).result()
    return held


def delete(parts: Sequence[Part]) -> None:
    """Takes these away and waits for it, each with the resource group that SkyPilot made for it; a group of the user's own stays, and so does
    one that holds something else. UserError if Azure refuses, at once or later, or if a group stays."""
    if not parts:
        return
    with _asked():
        from azure.core.exceptions import ResourceNotFoundError

        compute, resource = _clients()
        calls: dict[str, tuple[Any, tuple[str, ...]]] = {}
        kept: dict[str, list[str]] = {}
        for part in parts:
            group, name = _group(part.id), part.id.rpartition("/")[2]
            others: list[str] = []
            if _made_for(part):
                with contextlib.suppress(ResourceNotFoundError):
                    others = _others_in(resource, part)
            if others:
                kept[group] = others
            if _made_for(part) and not others:
                calls[group] = resource.resource_groups.begin_delete, (group,)
            elif part.kind != "group":
                calls[part.id] = (
                    (compute.virtual_machines if part.kind == "machine" else compute.disks).begin_delete,
                    (group, name),
                )
        going = []
        for begin, names in calls.values():
            with contextlib.suppress(ResourceNotFoundError):  # gone already
                going.append(begin(*names))
        for poller in going:
            poller.result()
    if kept:
        words = "; ".join(f"{group} holds {', '.join(others)}" for group, others in kept.items())
        raise UserError(
            f"Azure: {words}, which mistralctl did not make: the resource group stays, with its network and address; move that elsewhere, then "
            "delete the group by hand",
            Exit.CLOUD,
        )
