"""What a node says of its machine: the script that runs there, beside programs and metadata services that answer as the real ones do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
from mistralctl import output, package_dir

SCRIPT = package_dir("model") / "node" / "machine.py"
# Queries and headings as nvidia-smi of driver 580 prints them.
SMI = """#!/bin/sh
case "$1" in
  --query-gpu=*) echo "NVIDIA L4, 580.95.05, 23034, 20811, 8.9, 72.00, 4" ;;
  *) echo "| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: 13.0     |" ;;
esac
"""
# Path, the header that the service insists on, and its answer.
SERVICES = {
    "/latest/api/token": ("X-aws-ec2-metadata-token-ttl-seconds", "60", "a-token"),
    "/latest/meta-data/ami-id": ("X-aws-ec2-metadata-token", "a-token", "ami-0123456789abcdef0"),
    "/computeMetadata/v1/instance/image": ("Metadata-Flavor", "Google", "projects/p/global/images/skypilot-gcp-gpu-ubuntu-260603"),
    "/metadata/instance/compute/storageProfile": ("Metadata", "true", json.dumps({"imageReference": {
        "id": "", "publisher": "microsoft-dsvm", "offer": "ubuntu-hpc", "sku": "2204", "version": "22.04.2026070101"}})),
}  # fmt: skip


class _Metadata(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        header, wanted, answer = SERVICES[self.path.partition("?")[0]]
        right = self.headers.get(header) == wanted
        self.send_response(200 if right else 401)
        self.end_headers()
        self.wfile.write(answer.encode() if right else b"")

    do_PUT = do_GET  # noqa: N815 - the name is http.server's

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, beside a metadata service of its own."""
    spec = importlib.util.spec_from_file_location("machine_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(module, "METADATA", f"http://127.0.0.1:{server.server_port}")
    yield module
    server.shutdown()


@pytest.mark.parametrize(
    ("cloud", "image"),
    [
        ("aws", "ami-0123456789abcdef0"),
        ("gcp", "projects/p/global/images/skypilot-gcp-gpu-ubuntu-260603"),
        ("azure", "microsoft-dsvm:ubuntu-hpc:2204:22.04.2026070101"),
        ("", None),
        ("elsewhere", None),
    ],
)
def test_the_image_is_what_the_metadata_service_says(machine: ModuleType, cloud: str, image: str | None) -> None:
    assert machine.image(cloud) == image


def test_the_image_of_azures_community_gallery(machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    path, gallery = "/metadata/instance/compute/storageProfile", "/CommunityGalleries/skypilot/Images/gpu/Versions/latest"
    reference = {"id": "", "publisher": "", "offer": "", "sku": "", "version": "", "communityGalleryImageId": gallery}
    monkeypatch.setitem(SERVICES, path, ("Metadata", "true", json.dumps({"imageReference": reference})))
    assert machine.image("azure") == gallery


def test_a_metadata_service_that_does_not_answer_is_no_error(machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "METADATA", "http://127.0.0.1:9")
    assert [machine.image(cloud) for cloud in ("aws", "gcp", "azure")] == [None, None, None]


def _run(tmp_path: Path, smi: str | None) -> dict[str, object]:
    """What the script prints on a machine with that nvidia-smi and gcc alone."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("gcc", "#!/bin/sh\n"), ("nvidia-smi", smi)):
        if text is not None:
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
    (tmp_path / "node" / "run" / "mine").mkdir(parents=True)
    pulled = {"uri": "s3://b/m", "fetched": 14_500_000_000, "seconds": 50.0, "disk_written": 9_000_000_000, "disk_seconds": 45.0}
    (tmp_path / "node" / "run" / "mine" / "pulled.json").write_text(json.dumps(pulled))
    env = {"PATH": str(programs), "MISTRALCTL_NODE_DIR": str(tmp_path / "node")}
    done = subprocess.run([sys.executable, SCRIPT, "", "mine"], env=env, capture_output=True, text=True, check=True, timeout=600)
    return dict(json.loads(done.stdout))


def test_a_gpu_machine(tmp_path: Path) -> None:
    found = _run(tmp_path, SMI)
    assert found["gpus"] == [{
        "name": "NVIDIA L4", "driver": "580.95.05", "memory_mib": "23034", "memory_used_mib": "20811", "capability": "8.9",
        "power_limit_w": "72.00", "pcie": "4",
    }]  # fmt: skip
    assert (found["cuda"], found["gpu_problem"]) == ("13.0", "")
    assert found["programs"] == {"gcc": str(tmp_path / "bin" / "gcc"), "ninja": None, "nvcc": None, "nvidia-modprobe": None}
    text = output.node_text(found)
    assert "GPU         NVIDIA L4, 20811 of 23034 MiB used, capability 8.9, driver 580.95.05" in text
    assert "CUDA        the driver runs CUDA up to 13.0" in text
    assert "programs    gcc: " in text
    assert "pull        290 MB/s from s3://b/m, disk 200 MB/s while busy" in text
    assert found["cpus"] == os.cpu_count()


def test_a_gpu_whose_inforom_is_damaged_is_shown(tmp_path: Path) -> None:
    warned = "#!/bin/sh\necho 'NVIDIA L4, 580.95.05, 23034, 0, 8.9, 72.00, 4'\necho 'WARNING: infoROM is corrupted at gpu 0000:00:1E.0'\nexit 14\n"
    assert _run(tmp_path, warned)["gpus"][0]["name"] == "NVIDIA L4"  # type: ignore[index]


def test_a_metadata_service_that_says_something_else_is_no_error(machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/metadata/instance/compute/storageProfile"
    for answer in ("{}", "[]", json.dumps({"imageReference": None}), "<html>"):
        monkeypatch.setitem(SERVICES, path, ("Metadata", "true", answer))
        assert machine.image("azure") is None


@pytest.mark.parametrize(
    ("smi", "why"),
    [
        (None, "no nvidia-smi"),
        ("#!/bin/sh\necho 'No devices were found'\nexit 6\n", "No devices were found"),
        (
            '#!/bin/sh\necho "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver."\nexit 9\n',
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
        ),
        ("#!/bin/sh\nexit 0\n", "nvidia-smi ended with code 0"),
    ],
)
def test_why_a_gpu_is_not_shown(tmp_path: Path, smi: str | None, why: str) -> None:
    found = _run(tmp_path, smi)
    assert (found["gpus"], found["gpu_problem"], found["cuda"]) == ([], why, None)
    assert f"GPU         none ({why})" in output.node_text(found)
