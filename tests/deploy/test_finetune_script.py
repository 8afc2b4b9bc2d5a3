"""The script of a run on its machine, the real finetune.sh: what it says of itself, and its end, which `extend` puts off. What trains only waits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mistralctl import package_dir

pytestmark = [pytest.mark.linux, pytest.mark.slow]
NODE = package_dir("model") / "node"
# A step that waits until it is asked to end, and then says that a checkpoint is sealed; `prove` and `publish` end at once.
TRAINER = """#!/bin/bash
[ "$3" = train ] || exit 0
trap 'echo "asked to end at step 3 of 9" >&2; exit 75' TERM
touch "$STARTED"
while [ ! -e "$STARTED.done" ]; do sleep 0.1; done
"""


class Node:
    """A node's folder with a run whose environment holds TRAINER."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.started = folder, folder / "run" / "mine", folder / "started"
        self.scripts = self.run / "model" / "node"
        shutil.copytree(NODE, self.scripts, ignore=shutil.ignore_patterns("vllm-*", "mistral_node", "__pycache__"))
        script = self.scripts / "finetune.sh"
        script.write_text(script.read_text("utf-8").replace("LOOK=5 ", "LOOK=1 "), "utf-8")
        python = folder / "envs" / "tune" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(TRAINER)
        python.chmod(0o755)

    def start(self, **envs: str) -> subprocess.Popen[str]:
        told = {
            "MISTRALCTL_NAME": "mine", "MISTRALCTL_NODE_DIR": str(self.folder), "MISTRALCTL_ENV_ID": "vllm", "MISTRALCTL_TUNE_ENV_ID": "tune",
            "MISTRALCTL_DATA": "chats.jsonl", "MISTRALCTL_GPUS": "1", "MISTRALCTL_DEVICE": "cpu", "STARTED": str(self.started), **envs,
        }  # fmt: skip
        process = subprocess.Popen(
            ["bash", str(self.scripts / "finetune.sh"), "run"], env={"PATH": os.environ["PATH"], "HOME": str(self.folder), **told},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        for _ in range(3000):
            if self.started.exists():
                return process
            time.sleep(0.1)
        raise AssertionError(process.communicate())

    def status(self) -> dict[str, object]:
        return dict(json.loads((self.run / "status.json").read_text("utf-8")))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "node")


def test_it_says_its_phase_and_that_it_is_published(node: Node) -> None:
    process = node.start()
    assert node.status() == {"state": "train"}
    assert not (node.run / "ends_at").exists()
    Path(f"{node.started}.done").touch()
    assert process.wait(300) == 0
    assert node.status() == {"state": "published"}


def test_it_ends_at_the_time_that_the_file_says(node: Node) -> None:
    process = node.start(MISTRALCTL_TTL_MINUTES="60")
    ends_at = node.run / "ends_at"
    assert int(ends_at.read_text()) > time.time() + 3000
    ends_at.write_text(f"{int(time.time()) - 1}\n")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 75
    why = "its time or its budget is over; asked to end at step 3 of 9"
    assert node.status() == {"state": "failed", "error": {"message": why}}
    assert '"phase": "train", "event": "fail"' in said


def test_a_life_that_is_put_off_is_not_ended_at_its_first_end(node: Node) -> None:
    process = node.start(MISTRALCTL_TTL_MINUTES="1")
    ends_at = node.run / "ends_at"
    ends_at.write_text(f"{int(time.time()) + 3}\n")
    ends_at.write_text(f"{int(time.time()) + 3600}\n")
    deadline = time.time() + 5
    while time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert node.status()["error"] == {"message": "asked to end; asked to end at step 3 of 9"}


def test_a_budget_ends_it_also_without_a_life(node: Node) -> None:
    (node.run / "paid_from").write_text(f"{int(time.time())}\n")
    process = node.start(MISTRALCTL_BUDGET="1", MISTRALCTL_PRICE="1")
    (node.run / "paid_from").write_text(f"{int(time.time()) - 3600}\n")
    process.communicate(timeout=300)
    assert process.returncode == 75
