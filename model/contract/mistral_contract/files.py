"""The files and folders below a node's one folder: their names, and what is in them. NAME is a deployment's, KEY a hash."""

from __future__ import annotations

from dataclasses import dataclass

ENTRIES: list[Entry] = []


@dataclass(frozen=True)
class Entry:
    """One file or folder: its path below the node's folder, and what it is."""

    path: str
    what: str

    @property
    def name(self) -> str:
        """Its own name, the last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    def of(self, deployment: str) -> str:
        """Its path for one deployment, below the node's folder.

        >>> STATUS.of("mistral")
        'run/mistral/status.json'
        """
        return self.path.rstrip("/").replace("NAME", deployment)


def _entry(path: str, what: str) -> Entry:
    ENTRIES.append(Entry(path, what))
    return ENTRIES[-1]


ENVIRONMENTS = _entry("envs/", "environments, each made once and shared by all deployments of this node: ENV_ID with vLLM, weights-HASH of "
                      "mistral_weights; `.complete` in each that is")  # fmt: skip
WEIGHTS = _entry("weights/", "sets of weights, WEIGHTS_ID (of a mirror: its name); visible only when complete")
MANIFEST = _entry("weights/WEIGHTS_ID/mistral-weights.json", "the manifest of a set: name, size and hash of each file")
CANARIES = _entry("canaries/", "KEY.json: the canary's figures that the first engine with some weights made; KEY is the hash of those weights "
                  "and of what they are quantized to. The laptop keeps a copy under MISTRALCTL_HOME/canaries")  # fmt: skip
RUN = _entry("run/NAME/", "all of one deployment")
MODEL = _entry("run/NAME/model/", "the sources of the node's packages and of the environment (the task's one file mount)")
SITE = _entry(
    "run/NAME/site/", "vllm_mistral, mistral_node and the others, installed from model/ without their dependencies; on PYTHONPATH"
)
KEYS = _entry("run/NAME/keys/", "a folder of its own, which vLLM's user may read")
KEYS_FILE = _entry("run/NAME/keys/keys.json", "who may ask (below): written by the launcher from MISTRALCTL_KEYS unless a newer one is there, and "
                   "by `mistralctl keys`, or taken from MISTRALCTL_KEYS_URI")  # fmt: skip
KEYS_LOCK = _entry("run/NAME/keys.lock", "held (flock) by whoever replaces keys.json, from reading it to writing it; not in the folder keys, where "
                   "vLLM's user could hold it")  # fmt: skip
WEIGHTS_TOOL = _entry(
    "run/NAME/weights-tool", "a link to the environment of mistral_weights that set-up made for this deployment's stores"
)
SECRETS = _entry("run/NAME/secrets.json", 'mode 0600: {"hf_token": "..."}; written by the laptop if it has anything to send, never part of the '
                 'task. With MISTRALCTL_TLS "address" (what the laptop calls this machine) or "tls_certificate" and "tls_key". "figures": JSON '
                 "list of the figures that the laptop keeps of this model's weights, which are no secret and never waited for")  # fmt: skip
GATE = _entry("run/NAME/gate.json", "what the launcher's own walk found (below); removed when the launcher starts")
LORA = _entry("run/NAME/lora/", "an adapter in each folder; replaced as a whole when the store has another version")
ADAPTERS = _entry("run/NAME/adapters/", "adapters that came with the task, from folders of the laptop")
UPLOAD = _entry("run/NAME/upload/", "weights that came with the task, from a folder of the laptop")
DATA = _entry("run/NAME/data/", "of a run of training: chats that came with the task, or were fetched")
TUNE = _entry("run/NAME/tune/", "of a run of training: its checkpoints and its result, sealed")
PULLED = _entry(
    "run/NAME/pulled.json", "the result of the last pull that brought weights: bytes, seconds, what the disk wrote meanwhile"
)
ERRORS = _entry(
    "run/NAME/errors/",
    "what each part of the set-up wrote to standard error; the last line becomes the message of a failed phase",
)
SETUP_LOCK = _entry("run/NAME/setup.lock", "held by a set-up, so that a second one waits")
STATUS = _entry("run/NAME/status.json", "what the launcher knows of itself (below); replaced as a whole, never half written")
ENDS_AT = _entry(
    "run/NAME/ends_at", "when the life of this deployment ends, seconds since the epoch; made by watch.sh, replaced by `extend`"
)
PAID_FROM = _entry("run/NAME/paid_from", "since when a rented machine is paid for, seconds since the epoch: its first start. A time in which it is "
                   "stopped counts, too")  # fmt: skip
WATCH = _entry("run/NAME/watch", "the process of the newest watch (watch.sh); an older one ends when it sees another there")
WATCH_LOG = _entry("run/NAME/watch.log", "what the watch of a rented machine did")
SHARED = _entry("run/NAME/shared/", "what launcher and vLLM both write; made anew at each start")
ENGINE = _entry(
    "run/NAME/shared/engine.json",
    "what the model class says from inside the running engine; the launcher puts it into status.json",
)
TRAFFIC = _entry(
    "run/NAME/shared/traffic", "counts of requests, shared in memory by the guard (which counts) and the launcher (which reads)"
)
ROUTES = _entry("run/NAME/shared/routes.json", 'every route of the running application, [{"path": "/health", "methods": ["GET"]}, ...]; '
                "`WEBSOCKET` for a websocket, `*` for a mounted application")  # fmt: skip
USAGE = _entry("run/NAME/shared/usage.json", 'what the guard has counted for each key, and the serial of the keys in force, {"version": 1, '
               '"serial": 1795478400, "keys": {ID: {"requests": 3, "tokens": 64, "refused": 0, "day": [...]}}, "refused": {"401": 7}}; '
               "the last counts requests and connections that were refused, by status or reason. Kept over starts")  # fmt: skip
CERTIFICATE = _entry("run/NAME/shared/tls.crt", "the server's certificate, with MISTRALCTL_TLS")
PRIVATE_KEY = _entry("run/NAME/shared/tls.key", "its private key, mode 0600")
