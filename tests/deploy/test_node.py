"""The node's set-up where it needs no node: what a GPU machine's driver must be, and that vLLM for GPUs can be had at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from mistralctl import package_dir
from mistralctl.tasks import environment_id, tree
from packaging.requirements import Requirement
from test_adapters import adapter

pytestmark = pytest.mark.linux  # so is a node
NODE = package_dir("model") / "node"
UV = Path(sys.executable).parent / "uv"


def set_up(tmp_path: Path, smi: str | None, code: int = 0, /, **variables: str) -> subprocess.CompletedProcess[str]:
    """The real setup.sh on a machine whose nvidia-smi prints this (None: that has none), weights in a folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "uv").symlink_to(UV)
    (programs / "gcc").symlink_to("/bin/true")
    if smi is not None:
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'E'\n{smi}\nE\nexit {code}\n")
        (programs / "nvidia-smi").chmod(0o755)
    envs = yaml.safe_load((package_dir("task_templates") / "serve.yaml").read_text())["envs"]
    (tmp_path / "weights").mkdir()
    envs |= {"MISTRALCTL_NODE_DIR": str(tmp_path / "node"), "MISTRALCTL_WEIGHTS": f"file://{tmp_path}/weights"}
    env = {**envs, "HOME": str(tmp_path), "PATH": f"{programs}:{os.defpath}", "UV_OFFLINE": "1", **variables}
    return subprocess.run(["bash", str(NODE / "setup.sh")], env=env, capture_output=True, text=True, check=False, timeout=600)


NOT_REACHED = (
    "the driver does not reach the GPU: {}; take another machine, or an image with a driver that fits it (--image CLOUD=ID)"
)
NO_MODULE = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is "
    "installed and running."
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"
HANDLE = "Unable to determine the device handle for GPU1: 0000:00:05.0: Unknown Error"


@pytest.mark.parametrize(
    ("smi", "code", "line"),
    [
        (None, 0, "this machine shows no NVIDIA GPU (nvidia-smi); use a machine type with one, or an image with its driver "
                  "(--image CLOUD=ID)"),
        ("535.216.01", 0, "the NVIDIA driver of this image is 535.216.01 and vLLM's CUDA 13 needs 580 or newer; name an image with "
                          "one (--image CLOUD=ID)"),
        ("580.95.05\n570.133.20", 0, "the NVIDIA driver of this image is 570.133.20 and vLLM's CUDA 13 needs 580 or newer; name an "
                                     "image with one (--image CLOUD=ID)"),
        (f"{NO_MODULE}\n", 9, NOT_REACHED.format(NO_MODULE)),
        ("No devices were found", 6, NOT_REACHED.format("No devices were found")),
        ("No devices were found", 0, NOT_REACHED.format("No devices were found")),
        (f"{MISMATCH}\nNVML library version: 580.126", 18, NOT_REACHED.format(MISMATCH)),
        ("", 0, NOT_REACHED.format("nvidia-smi says nothing")),
        ("", 255, NOT_REACHED.format("nvidia-smi ended with code 255")),
        ("[N/A]", 0, NOT_REACHED.format("[N/A]")),
        (f"580.95.05\n{HANDLE}", 255, NOT_REACHED.format(HANDLE)),
        ("580.95.05\n[GPU requires reset]", 0, NOT_REACHED.format("[GPU requires reset]")),
        ("580.95.05", 15, NOT_REACHED.format("nvidia-smi ended with code 15")),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_serve_is_named_before_anything_is_installed(
    tmp_path: Path, smi: str | None, code: int, line: str
) -> None:
    done = set_up(tmp_path, smi, code)
    assert done.returncode != 0
    assert '"phase": "environment", "event": "fail", "at": ' in done.stdout
    assert done.stdout.splitlines()[-1].endswith(f'"message": "{line}"}}')
    assert not list((tmp_path / "node" / "envs").glob("cuda-*/bin"))


@pytest.mark.parametrize(
    ("smi", "code", "gpus", "line"),
    [
        ("580.65.06", 0, 1, ""),
        ("595.58.03\n595.58.03", 0, 2, ""),
        ("580.95.05\nWARNING: infoROM is corrupted at gpu 0000:00:1E.0", 14, 1, ""),
        ("580.95.05\n" * 7, 0, 8, "this machine shows 7 NVIDIA GPUs and 8 shall share the model; take another machine, or a smaller "
                                  "--tensor-parallel"),
    ],
)  # fmt: skip
def test_what_nvidia_smi_says_of_drivers(tmp_path: Path, smi: str, code: int, gpus: int, line: str) -> None:
    done = gpu_check(tmp_path, f"cat <<'E'\n{smi}\nE\nexit {code}", "check_driver", MISTRALCTL_TENSOR_PARALLEL=str(gpus))
    assert (done.returncode, done.stderr.strip()) == (1 if line else 0, line)


# Seconds pass where the script sleeps, and nowhere else.
CLOCK = "unset SECONDS; SECONDS=0; sleep() { SECONDS=$((SECONDS + $1)); }"


@pytest.mark.parametrize(
    ("says", "line"),
    [
        ("[N/A], [N/A]", ""),
        ("Completed, Success\nCompleted, Success", ""),
        ('Field "fabric.state" is not a valid field to query.', ""),
        ("Completed, Success\n$(cat state)", ""),  # from the third question on
        ("Completed, Success\nIn Progress, N/A", "In Progress, N/A"),
        ("Not Started, [N/A]", "Not Started, [N/A]"),
        ("Completed, Insufficient Resources", "Completed, Insufficient Resources"),
    ],
)
def test_the_fabric_of_gpus_behind_a_switch_is_waited_for(tmp_path: Path, says: str, line: str) -> None:
    (tmp_path / "state").write_text("In Progress, N/A")
    smi = f'cd {tmp_path}; echo >> asked; [ "$(wc -l < asked)" -lt 3 ] || echo "Completed, Success" > state; echo "{says}"'
    done = gpu_check(tmp_path, smi, f"{CLOCK}; FABRIC_SECONDS={2 if line else 60}; check_fabric")
    if line:
        assert done.returncode == 1
        assert f"the GPUs' NVLink fabric is not ready after 2 s (state, status: {line}); nvidia-fabricmanager" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")
    asked = len((tmp_path / "asked").read_text())
    assert asked == 3 if line else asked == (3 if "$(cat" in says else 1)


def test_an_nvidia_smi_that_hangs_is_named(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "exec sleep 30", "ANSWER_SECONDS=1; check_driver")
    assert NOT_REACHED.format("nvidia-smi did not answer within 1 s") in done.stderr


@pytest.mark.parametrize(
    ("programs", "called"),
    [
        ({"nvidia-modprobe": 0, "modprobe": 0}, ["nvidia-modprobe -c 0 -u"]),
        ({"modprobe": 0}, ["modprobe nvidia-uvm"]),
        ({"nvidia-modprobe": 1, "modprobe": 1}, ["nvidia-modprobe -c 0 -u", "modprobe nvidia-uvm"]),
        ({}, []),
    ],
)
def test_what_cuda_needs_is_loaded_before_vllm_loses_its_privileges(
    tmp_path: Path, programs: dict[str, int], called: list[str]
) -> None:
    """sealed.sh prepare, with programs that leave a mark instead of changing this machine."""
    harmless = ("id", "install", "iptables", "ip6tables")
    for name, code in (programs | dict.fromkeys(harmless, 0)).items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    for name in ("bash", "rm"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    command = [str(tmp_path / "bash"), str(NODE / "sealed.sh"), "prepare", "somebody", "0", str(tmp_path / "shared")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tmp_path / "called").read_text().splitlines()
    assert [line for line in lines if "modprobe" in line] == called
    assert lines[: len(called) + 1] == [*called, "id somebody"]


@pytest.mark.parametrize(("gcc", "clang", "works"), [(0, 1, True), (None, 0, True), (1, 0, False), (None, None, False)])
def test_a_machine_without_a_c_compiler_is_named(tmp_path: Path, gcc: int | None, clang: int | None, works: bool) -> None:
    for name, code in (("gcc", gcc), ("clang", clang)):
        if code is not None:
            (tmp_path / name).write_text(f"#!/bin/bash\n[[ $(< /dev/stdin) = '#include <stdlib.h>' ]] && exit {code}\nexit 3\n")
            (tmp_path / name).chmod(0o755)
    (tmp_path / "bash").symlink_to("/bin/bash")
    done = gpu_check(tmp_path, "", "PATH=${PATH%%:*}; check_compiler")
    assert done.returncode == (0 if works else 1)
    assert ("this machine has no C compiler with its headers" in done.stderr) is not works


def gpu_check(tmp_path: Path, smi: str, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A function of gpu.sh, as setup.sh calls it, with this nvidia-smi."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\n{smi}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    script = f"set -euo pipefail; . {NODE}/gpu.sh; {command}"
    env = {"PATH": f"{tmp_path}:{os.defpath}", **variables}
    return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_a_failed_download_is_tried_three_times_and_named(tmp_path: Path) -> None:
    nobody = {"UV_OFFLINE": "0", "UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0", "UV_FIND_LINKS": ""}
    done = set_up(
        tmp_path,
        "580.65.06",
        **nobody,
        UV_CACHE_DIR=str(tmp_path / "cache"),
        MISTRALCTL_PYTHON=sys.executable,
        MISTRALCTL_DEVICE="cuda",
    )
    assert done.returncode != 0
    tries = [line for line in done.stderr.splitlines() if line.startswith("attempt ")]
    assert {"attempt 1 of 3 failed; once more in 5 s", "attempt 2 of 3 failed; once more in 10 s"} == set(tries)
    [said] = [line for line in done.stdout.splitlines() if '"environment", "event": "fail"' in line]
    assert "the environment of vLLM could not be installed (Failed to fetch: http://127.0.0.1:9/simple/" in said
    assert "refused" in said
    assert "check the network and the free disk space, then run up again" in said


# Makes environments in no time: the tool's has a real Python, and vLLM's takes as long as the weights need to fail.
FAKE_UV = f"""#!/bin/bash
case "$1 $2" in
  "run "*) exec {UV} "$@" ;;
  "venv "*) mkdir -p "${{@: -1}}/bin"; ln -sf {sys.executable} "${{@: -1}}/bin/python" ;;
  "pip "*) [[ "$*" != *--target* ]] || while [ ! -e "$HOME/pulled" ]; do sleep 0.05; done ;;
esac
"""
FAKE_TOOL = """#!/bin/bash
code=0
{python} "$@" || code=$?
printf '%s\\n' "$*" >> $HOME/pulled
exit $code
"""


def run_with_fakes(tmp_path: Path, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A real script of the node and the real weights tool, with environments that need no download."""
    (tmp_path / "bin").mkdir(parents=True, exist_ok=True)
    tool = tmp_path / "bin" / "python"
    tool.write_text(FAKE_TOOL.format(python=sys.executable))
    uv = tmp_path / "bin" / "uv"
    uv.write_text(FAKE_UV.replace(f"ln -sf {sys.executable}", f"ln -sf {tool}"))
    for program in (tool, uv):
        program.chmod(0o755)
    envs = yaml.safe_load((package_dir("task_templates") / "serve.yaml").read_text())["envs"]
    envs |= {"MISTRALCTL_NODE_DIR": str(tmp_path / "node"), "MISTRALCTL_DEVICE": "cpu", "MISTRALCTL_PYTHON": sys.executable}
    env = {**envs, "HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.defpath}", "MISTRALCTL_REVISION": "", **variables}
    return subprocess.run(["bash", str(NODE / script), *words], env=env, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_weights_that_fail_while_vllm_is_installed_are_named_every_time(tmp_path: Path) -> None:
    def once(number: int) -> list[str]:
        home = tmp_path / str(number)
        done = run_with_fakes(home, "setup.sh", MISTRALCTL_WEIGHTS=f"file://{home}/nowhere")
        assert done.returncode == 3
        return [json.loads(line.split(" ", 1)[1])["message"] for line in done.stdout.splitlines() if '"event": "fail"' in line]

    with ThreadPoolExecutor(2) as pool:
        for number, said in enumerate(pool.map(once, range(12))):
            assert said == [f"mistral_weights: there is no folder {tmp_path}/{number}/nowhere; check the path"]


def test_a_set_up_waits_for_the_one_before_it(tmp_path: Path) -> None:
    """What `up --cloud local` starts when it was killed and is called again: each would take away what the other installs."""
    some_weights(tmp_path / "weights")
    (tmp_path / "node" / "run" / "mistral").mkdir(parents=True)
    (tmp_path / "node" / "run" / "mistral" / "secrets.json").write_text("{}")
    lock = tmp_path / "node" / "run" / "mistral" / "setup.lock"
    other = subprocess.Popen(
        ["flock", lock, "bash", "-c", "echo held; sleep 1; touch $0", tmp_path / "ended"], stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    done = run_with_fakes(tmp_path, "setup.sh", MISTRALCTL_WEIGHTS=f"file://{tmp_path}/weights")
    assert (tmp_path / "ended").exists()
    assert done.stdout.splitlines()[0] == "waits for another set-up of mistral"
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "node" / "run" / "mistral" / "site").is_dir()
    other.wait(300)


def test_a_uv_that_another_set_up_installs_is_waited_for(tmp_path: Path) -> None:
    """Two first deployments of this machine at once: the second took a program that was half there."""
    (tmp_path / "bin").mkdir()
    pip = 'd=$(dirname "$0"); echo "#!/bin/bash" > "$d/uv"; chmod +x "$d/uv"; until [ -e GO ]; do sleep 0.05; done; echo "echo whole" >> "$d/uv"'
    (tmp_path / "pip").write_text("#!/bin/bash\n" + pip.replace("GO", f"{tmp_path}/go"))
    (tmp_path / "pip").chmod(0o755)
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/bash\nmkdir -p "$3/bin"; cp {tmp_path}/pip "$3/bin/pip"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    script = f'here={NODE} node_dir={tmp_path}/node; . "$here/once.sh"; . "$here/weights.sh"; "$(find_uv)"'
    uv = tmp_path / "node" / "envs" / "uv" / "bin" / "uv"
    (tmp_path / "node" / "envs").mkdir(parents=True)
    both = []
    try:
        for _ in range(2):
            environ = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
            both.append(subprocess.Popen(["bash", "-c", script], env=environ, stdout=subprocess.PIPE))
            while not uv.exists():
                assert both[0].poll() is None
                time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            both[1].wait(1)
    finally:
        (tmp_path / "go").touch()
    assert [one.communicate(timeout=300)[0] for one in both] == [b"whole\n", b"whole\n"]


@pytest.mark.parametrize(
    ("uri", "awaited", "waits"),
    [("hf://a/b", '["hf_token"]', True), ("hf://a/b", "[]", False), ("hf://a/b", '["address"]', False), ("s3://a/b", '["hf_token"]', False)],
)  # fmt: skip
def test_only_a_hub_whose_token_comes_is_waited_for(tmp_path: Path, uri: str, awaited: str, waits: bool) -> None:
    """The function of setup.sh, with the tool replaced by a word."""
    pull = re.search(r"^pull\(\) .*?^}$", (NODE / "setup.sh").read_text(), re.MULTILINE | re.DOTALL)
    assert pull is not None
    replaced = 'sleep() { echo waits; echo {} > "$run_dir/secrets.json"; }; mistral_weights() { echo pulls; }'
    script = f"run_dir={tmp_path}; {replaced}\n{pull[0]}\npull {uri} folder"
    process = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, env={"PATH": os.defpath, "MISTRALCTL_SECRETS": awaited}
    )
    assert process.communicate(timeout=600)[0] == (b"waits\npulls\n" if waits else b"pulls\n")


def test_a_mirror_that_fails_says_why_in_its_phase(tmp_path: Path) -> None:
    envs = {"MISTRALCTL_MIRROR_SOURCE": f"file://{tmp_path}/nowhere", "MISTRALCTL_MIRROR_TARGET": f"file://{tmp_path}/target"}
    done = run_with_fakes(tmp_path, "mirror.sh", "run", **envs)
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1].endswith(
        f'"message": "mistral_weights: there is no folder {tmp_path}/nowhere; check the path"}}'
    )


def test_a_mirror_with_figures_makes_the_environment_with_torch_and_uses_it(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    envs = {
        "MISTRALCTL_MIRROR_SOURCE": f"file://{tmp_path}/weights", "MISTRALCTL_MIRROR_TARGET": f"file://{tmp_path}/target",
        "MISTRALCTL_ENV_ID": "cpu-figures",
    }  # fmt: skip
    python = tmp_path / "node" / "envs" / "cpu-figures" / "bin" / "python"
    done = run_with_fakes(tmp_path, "mirror.sh", "run", **envs)
    assert done.stdout.splitlines()[-1].endswith(
        f'"message": "mistral_weights: {python} cannot be run (No such file or directory); it should be a Python with torch"}}'
    )
    done = run_with_fakes(tmp_path, "mirror.sh", "setup", **envs)
    assert (done.returncode, python.exists()) == (0, True), done.stderr
    plain = run_with_fakes(tmp_path, "mirror.sh", "run", **envs | {"MISTRALCTL_ENV_ID": ""})
    assert plain.returncode == 0, plain.stderr
    assert sorted(path.name for path in (tmp_path / "target").glob("[!.]*")) == ["mistral-weights.json", "model.safetensors"]


def some_weights(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    sizes = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    more = {"num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "sliding_window": 4096, **sizes, **more}))


def test_a_retrained_adapter_is_brought_anew_and_judged_by_the_weights(tmp_path: Path) -> None:
    def run(folder: Path, home: Path) -> tuple[int, list[str]]:
        done = run_with_fakes(home, "setup.sh", MISTRALCTL_WEIGHTS=f"file://{tmp_path}/weights", MISTRALCTL_NODE_DIR=str(tmp_path / "node"),
                              MISTRALCTL_LORA=json.dumps({"sql": f"file://{folder}"}))  # fmt: skip
        return done.returncode, [
            json.loads(line.split(" ", 1)[1])["message"] for line in done.stdout.splitlines() if '"fail"' in line
        ]

    some_weights(tmp_path / "weights")
    first, other = adapter(tmp_path / "first"), adapter(tmp_path / "other", rank=16)
    lies = tmp_path / "node" / "run" / "mistral" / "lora" / "sql" / "adapter_config.json"
    assert run(first, tmp_path / "1") == (0, [])
    assert lies.read_bytes() == (first / "adapter_config.json").read_bytes()
    (first / "adapter_config.json").write_text(lies.read_text().replace("16", "32"))
    assert run(first, tmp_path / "2") == (0, [])
    assert json.loads(lies.read_text())["lora_alpha"] == 32
    assert run(other, tmp_path / "3") == (0, [])
    assert json.loads(lies.read_text())["r"] == 16
    code, said = run(adapter(tmp_path / "wrong", hidden=576), tmp_path / "4")
    assert code != 0
    assert said == ["the adapter sql: model.layers.31.self_attn.q_proj takes 4096 and gives 4096 in this model, 576 and 576 in the adapter; "
                    "it is another model's adapter"]  # fmt: skip


def test_adapters_are_read_as_json(tmp_path: Path) -> None:
    sources = {"sql": "a,b", "Two.2": "c:d {e}", "three": 'it\'s "f"', "four": "ü=g"}
    some_weights(tmp_path / "weights")
    for folder in sources.values():
        adapter(tmp_path / folder)
    adapters = {name: f"file://{tmp_path}/{folder}".replace(" ", "%20") for name, folder in sources.items()}
    done = run_with_fakes(
        tmp_path, "setup.sh", MISTRALCTL_WEIGHTS=f"file://{tmp_path}/weights", MISTRALCTL_LORA=json.dumps(adapters)
    )
    assert done.returncode == 0, done.stderr
    pulls = [line.split(" pull ")[1] for line in (tmp_path / "pulled").read_text().splitlines() if " pull " in line]
    lora = tmp_path / "node" / "run" / "mistral" / "lora"
    assert [pull.split(" --keep-cached")[0] for pull in pulls[1:]] == [f"{uri} {lora}/{name}" for name, uri in adapters.items()]


@pytest.mark.parametrize(
    ("info", "asked"),
    [
        ('{"cluster_name": "one", "cloud": "Azure", "region": "eastus"}', "login --identity --allow-no-subscriptions --output none\n"),
        ('{"cluster_name": "one", "cloud": "AWS", "region": "us-east-1"}', ""),
        (None, ""),
    ],
)  # fmt: skip
def test_an_azure_node_signs_in_with_its_own_identity_and_others_need_not(tmp_path: Path, info: str | None, asked: str) -> None:
    (tmp_path / "az").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "az").chmod(0o755)
    (tmp_path / "asked").touch()
    env = {"PATH": f"{tmp_path}:{os.defpath}", "HOME": str(tmp_path)} | ({"SKYPILOT_CLUSTER_INFO": info} if info else {})
    script = f"set -euo pipefail; here={NODE}; . {NODE}/once.sh; . {NODE}/weights.sh; ready_for_cloud"
    subprocess.run(["bash", "-c", script], env=env, check=True, timeout=600)
    assert (tmp_path / "asked").read_text() == asked


def pins(engine: str, python: str) -> dict[str, str]:
    """The versions that an engine's environment has with this Python, by its constraints."""
    found = {}
    for line in (NODE / f"vllm-{engine}" / "constraints.txt").read_text().splitlines():
        if line.startswith(" "):  # a hash
            continue
        requirement = Requirement(line.rstrip(" \\"))
        if requirement.marker is None or requirement.marker.evaluate(
            {"python_version": python, "python_full_version": f"{python}.9"}
        ):
            found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_vllm_for_gpus_resolves_to_its_pins_and_nothing_else(python: str, tmp_path: Path) -> None:
    """By the package index, for the node's system; nothing is installed."""
    env = {key: value for key, value in os.environ.items() if key != "UV_FIND_LINKS"}
    command = [
        UV, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", python, "--python-platform",
        "x86_64-manylinux_2_28", "--constraints", NODE / "vllm-cuda" / "constraints.txt", NODE / "vllm-cuda" / "requirements.txt",
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert dict(line.split("==") for line in done.stdout.splitlines()) == pins("cuda", python)


def test_vllm_for_gpus_is_built_for_one_cuda() -> None:
    """Flashinfer and CUTLASS load cuda-bindings, which cuda-python brings; a compiler newer than the driver writes code that it refuses."""
    found = pins("cuda", "3.11")
    assert found["cuda-python"].split(".")[0] == found["cuda-bindings"].split(".")[0] == "13"
    toolkit = ("toolkit", "runtime", "nvcc", "crt", "cccl", "nvrtc", "nvvm", "nvjitlink", "cupti")
    versions = {found.get(f"nvidia-cuda-{part}") or found.get(f"nvidia-{part}") or found[f"cuda-{part}"] for part in toolkit}
    assert {version.rsplit(".", version.count(".") - 1)[0] for version in versions} == {
        "13.0"
    }  # what OLDEST_DRIVER in gpu.sh stands for


def test_the_pins_for_gpus_are_those_that_were_installed_and_checked() -> None:
    """Packages that own the same file, imports, flags: run `make cuda-environment` after a change of model/node/vllm-cuda (8 GB)."""
    checked = json.loads((Path(__file__).parents[1] / "cuda_environment.json").read_text())
    assert checked["environment"] == environment_id("cuda", "3.11")


def test_both_engines_have_the_same_versions() -> None:
    cuda, cpu = pins("cuda", "3.13"), pins("cpu", "3.13")
    common = set(cuda) & set(cpu)
    assert len(common) > 100
    assert {name: cuda[name] for name in common} == {name: cpu[name] for name in common}


@pytest.mark.parametrize("engine", ["cuda", "cpu"])
@pytest.mark.parametrize("file", ["vllm-{}/constraints.txt", "vllm-{}/requirements.txt", "environment.sh"])
def test_the_name_of_an_environment_changes_with_all_that_it_is_made_from(
    engine: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(package_dir("model"), tmp_path / "model", ignore=shutil.ignore_patterns("plugin", "weights"))
    monkeypatch.setattr("mistralctl.tasks.package_dir", lambda name: tmp_path / name)
    tree.cache_clear()
    before = environment_id(engine, "3.11")
    assert before == environment_id(engine, "3.11") != environment_id(engine, "3.12")
    changed = tmp_path / "model" / "node" / file.format(engine)
    changed.write_text(changed.read_text() + "# changed\n")
    tree.cache_clear()
    assert environment_id(engine, "3.11") != before
