"""What all simulated clouds do alike: machines that boot as nodes, what goes wrong on the way, and the test's back door."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from simcloud import control
from simcloud.faults import ON_BOOT, REFUSALS, Fault, Faults, Journal
from simcloud.node_init import Machine
from simcloud.nodes import Nodes, Service

SLOW_SECONDS = 60.0
SMALL_MIB = 64


class Cloud(ABC):
    """A cloud's machines are nodes; what it lists of them, its own file says. `LAUNCH` is the API call that makes one."""

    LAUNCH: str
    KINDS: tuple[str, ...] = (*REFUSALS, *ON_BOOT)

    def __init__(self, folder: Path, image: Path, services: list[Service]) -> None:
        self.folder = folder
        (folder / "nodes").mkdir(exist_ok=True)
        self.faults = Faults()
        self.journal = Journal(folder / "journal.jsonl")
        self.nodes = Nodes(folder / "nodes", image, services, self.ended)
        self.no_ssh: set[str] = set()
        self.limits: list[tuple[str, str, float]] = []

    @abstractmethod
    def instances(self) -> list[dict[str, Any]]:
        """The fields of `simcloud.Instance`, oldest first."""

    @abstractmethod
    def volumes(self) -> list[dict[str, Any]]:
        """The disks that the cloud lists, each with the `instance` that it belongs to, or None."""

    @abstractmethod
    def firewalls(self) -> list[dict[str, Any]]:
        """Security groups, firewall rules; `ports`: what they open to others than their own network, and to which networks."""

    @abstractmethod
    def preempt(self, id: str) -> None:
        """The cloud wants its spot machine back."""

    @abstractmethod
    def ended(self, id: str, status: int) -> None:
        """A node ended by itself: it powered itself off (status 0) or crashed."""

    def power_on(self, machine: Machine, ports: Callable[[], set[int]], where: dict[str, Any]) -> None:
        """Boots a node, with what shall go wrong at that; `where`: region, zone, instance_type and spot of the machine."""
        faults = {kind: self.faults.find((kind,), **where) for kind in ON_BOOT}
        if faults["no_ssh"]:
            self.no_ssh.add(machine.id)
        slow, dies, small = faults["slow_boot"], faults["node_dies"], faults["small_disk"]
        if slow:
            machine = replace(machine, boot_seconds=slow.seconds or SLOW_SECONDS)
        if faults["no_driver"]:
            machine = replace(machine, asked="")
        if small:
            machine = replace(machine, disk_mib=small.mib or SMALL_MIB)
        self.nodes.boot(machine, lambda: ports() - ({22} if machine.id in self.no_ssh else set()))
        self.journal.write("boot", id=machine.id, address=machine.address, **where)
        if dies:
            timer = threading.Timer(dies.seconds or 0, self.kill_node, [machine.id])
            timer.daemon = True
            timer.start()

    def kill_node(self, id: str) -> None:
        """The hardware dies. The cloud goes on saying that the machine runs, and bills it."""
        self.nodes.halt(id)
        self.journal.write("kill_node", id=id)

    def refusal(self, action: str, where: dict[str, Any], token: str | None = None) -> Fault | None:
        """The fault by which a call is refused, if one is set; the same token again is the client's own retry."""
        return self.faults.find(REFUSALS, token, action=action, **where)

    def fault(self, kind: str, action: str | None, **where: Any) -> None:
        """Sets a fault; a refusal is one of launches unless another call is named, bad credentials are bad for all calls."""
        if kind not in self.KINDS:
            raise ValueError(f"{kind}: one of {', '.join(self.KINDS)}")
        if kind in REFUSALS and action is None:
            action = "*" if kind == "credentials" else self.LAUNCH
        self.faults.add(kind=kind, action=action, **where)

    def quota(self, code: str, limit: float, region: str) -> None:
        """What the cloud says of a quota from now on, in regions of this name (which may hold `*`)."""
        self.limits.append((region, code, limit))

    def limit(self, region: str, code: str, usual: float) -> float:
        """A quota's limit, as a test set it, else the usual one."""
        found = [limit for where, name, limit in self.limits if name == code and fnmatchcase(region, where)]
        return found[-1] if found else usual

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        self.faults.clear()
        self.limits.clear()

    def listen(self, **further: Callable[..., Any]) -> None:
        """Opens the back door for the test; `further` is what only some clouds can be asked."""
        operations: dict[str, Callable[..., Any]] = {
            "instances": self.instances, "volumes": self.volumes, "firewalls": self.firewalls, "fault": self.fault,
            "clear_faults": self.clear, "quota": self.quota, "preempt": self.preempt, "kill_node": self.kill_node,
        }  # fmt: skip
        control.listen(self.folder, operations | further)
