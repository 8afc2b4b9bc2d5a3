#!/usr/bin/python3
"""nvidia-smi of a simulated machine: what our scripts ask of it, in the words of the real one. What it shows lies in FILE.json beside it.

    nvidia-smi [-L | -q | --query-gpu=FIELD,... | --query-compute-apps=FIELD,...] [--format=csv[,noheader][,nounits]]

What is not written here it does not know, and says so. Sources of its words:

- a driver that is not loaded: skypilot-org/skypilot#449, code 9 by anderskm/gputil#26; one that finds no GPU which it can use:
  NVIDIA/open-gpu-kernel-modules#862, code 6 by nvidia-smi(1); a field that it does not know: public logs of driver 580, code 2 by nvidia-smi(1)
- Fabric: NVIDIA/gpu-operator#2511 (driver 580, eight GPUs); N/A on eight A100: bottlerocket-os/bottlerocket#3873
- `-L`, the first lines of `-q` and of the table: public logs of an L4 and an A100 with 580.126.09
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

UNITS = {"memory.total": " MiB", "memory.used": " MiB", "memory.free": " MiB", "power.limit": " W"}


def csv(fields: list[str], rows: list[dict[str, str]], form: list[str]) -> int:
    """Prints rows; 2, with its words, for a field that it does not know."""
    known = {"pid", "process_name", "used_memory", "gpu_uuid"} if not rows else set(rows[0])
    for field in fields:
        if field not in known:
            sys.stdout.write(f'Field "{field}" is not a valid field to query.\n\n')
            return 2
    if "noheader" not in form:
        units = {} if "nounits" in form else {"memory.total": " [MiB]", "memory.used": " [MiB]", "memory.free": " [MiB]"}
        sys.stdout.write(", ".join(field + units.get(field, "") for field in fields) + "\n")
    for row in rows:
        values = {field: row[field] + ("" if "nounits" in form else UNITS.get(field, "")) for field in fields}
        sys.stdout.write(", ".join("[N/A]" if value == "N/A" else value for value in values.values()) + "\n")
    return 0


def log(shown: dict[str, Any]) -> None:
    """The beginning of `-q`, and of each GPU its name and its fabric."""
    gpus = shown["gpus"]
    lines = [
        ("Timestamp", time.ctime()),
        ("Driver Version", shown["driver"]),
        ("CUDA Version", shown["cuda"]),
        ("Attached GPUs", len(gpus)),
    ]
    sys.stdout.write("\n==============NVSMI LOG==============\n\n" + "".join(f"{name:<55}: {value}\n" for name, value in lines))
    for gpu in gpus:
        sys.stdout.write(f"\nGPU {gpu['pci.bus_id']}\n    {'Product Name':<51}: {gpu['name']}\n    Fabric\n")
        sys.stdout.write(f"        {'State':<47}: {gpu['fabric.state']}\n        {'Status':<47}: {gpu['fabric.status']}\n")


def main(words: list[str]) -> int:
    shown: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
    if shown["trouble"]:
        text, code = shown["trouble"]
        sys.stdout.write(text + "\n")
        return int(code)
    asked = dict(word.partition("=")[::2] for word in words)
    form = asked.pop("--format", "").split(",")
    if "--query-gpu" in asked:
        return csv(asked["--query-gpu"].split(","), shown["gpus"], form)
    if "--query-compute-apps" in asked:
        return csv(asked["--query-compute-apps"].split(","), [], form)
    if not asked:
        sys.stdout.write(
            f"{time.ctime()}\n| NVIDIA-SMI {shown['driver']:<22} Driver Version: {shown['driver']:<14} CUDA Version: {shown['cuda']:<8} |\n"
        )
        return 0
    if words == ["-q"]:
        log(shown)
        return 0
    if words == ["-L"]:
        sys.stdout.write("".join(f"GPU {gpu['index']}: {gpu['name']} (UUID: {gpu['uuid']})\n" for gpu in shown["gpus"]))
        return 0
    sys.stdout.write(f"nvidia-smi of the simulated clouds does not know {' '.join(words)}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
