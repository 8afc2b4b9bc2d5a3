"""Deployment templates: expressions in brackets, evaluated as far as SkyPilot's templates use them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any

from simcloud.arm.errors import Refused

_WORD = re.compile(r"\s*(?:'((?:[^']|'')*)'|(\d+)|([A-Za-z_]\w*)|(.))")
Put = Callable[[str, dict[str, Any]], dict[str, Any]]
Find = Callable[[str], dict[str, Any]]


class Template:
    """One deployment into a resource group (`group` is its document); `put` makes a resource, `find` gives one by id."""

    def __init__(self, template: dict[str, Any], given: dict[str, Any], group: dict[str, Any], put: Put, find: Find) -> None:
        self.template, self.group, self.put, self.find = template, group, put, find
        self.parameters = {
            name: given.get(name, {}).get("value", of.get("defaultValue")) for name, of in template.get("parameters", {}).items()
        }
        self.ids: dict[str, str] = {}

    def deploy(self) -> dict[str, Any]:
        """Makes the resources in the order in which they stand; the outputs."""
        for draft in self.template["resources"]:
            resource = self.value(draft)
            space, *kinds = resource["type"].split("/")
            path = "".join(f"/{kind}/{name}" for kind, name in zip(kinds, resource["name"].split("/"), strict=True))
            self.ids[resource["name"]] = identifier = f"{self.group['id']}/providers/{space}{path}"
            self.put(identifier, resource)
        outputs = self.template.get("outputs", {})
        return {name: {"type": "String", "value": self.value(of["value"])} for name, of in outputs.items()}

    def value(self, of: Any) -> Any:
        if isinstance(of, dict):
            return {key: self.value(inner) for key, inner in of.items()}
        if isinstance(of, list):
            return [self.value(inner) for inner in of]
        if isinstance(of, str) and of.startswith("[") and of.endswith("]"):
            return self.expression([match.groups() for match in _WORD.finditer(of[1:-1])])
        return of

    def expression(self, words: list[tuple[str | None, ...]]) -> Any:
        """The value of an expression; its words are taken off the list."""
        text, number, name, _ = words.pop(0)
        if text is not None:
            return text.replace("''", "'")
        if number is not None:
            return int(number)
        arguments = []
        words.pop(0)  # (
        while words[0][3] != ")":
            arguments.append(self.expression(words))
            if words[0][3] == ",":
                words.pop(0)
        words.pop(0)
        value = self.call(str(name), arguments)
        while words and words[0][3] == ".":
            words.pop(0)
            value = value[str(words.pop(0)[2])]
        return value

    def call(self, name: str, arguments: list[Any]) -> Any:
        def path(kind: str, *names: str) -> str:
            space, *kinds = kind.split("/")
            return f"/providers/{space}" + "".join(f"/{one}/{name}" for one, name in zip(kinds, names, strict=True))

        subscription = "/".join(self.group["id"].split("/")[:3])
        functions: dict[str, Callable[..., Any]] = {
            "parameters": lambda of: self.parameters[of],
            "variables": lambda of: self.value(self.template["variables"][of]),
            "concat": lambda *parts: "".join(map(str, parts)),
            "guid": lambda *parts: str(uuid.uuid5(uuid.NAMESPACE_OID, "-".join(parts))),
            "resourceGroup": lambda: self.group,
            "resourceId": lambda *of: self.group["id"] + path(*of),
            "subscriptionResourceId": lambda *of: subscription + path(*of),
            "reference": lambda of: self.find(str(self.ids.get(of, of)))["properties"],
        }
        if name not in functions:
            raise Refused(400, "InvalidTemplate", f"the function {name} is not simulated")
        return functions[name](*arguments)
