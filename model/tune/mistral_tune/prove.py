"""The proof: vLLM with our class loads base and result, and has to say of the answers that were held out what peft says."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vllm_mistral
from mistral_contract import adapters
from mistral_contract import figures as canary
from mistral_node import weights
from mistral_node.engines.vllm import IN_THE_ENGINE, NOTHING_BUILT
from mistral_weights.disk import write_whole

from mistral_tune import figures, log
from mistral_tune.errors import TuneError
from mistral_tune.figures import Asked
from mistral_tune.job import Job

MOST_SAMPLES, LONGEST_SAMPLE = 8, 128  # questions; tokens of an answer


@dataclass(frozen=True)
class Sample:
    """A question that was held out, the answer that was expected, and what the model says before and after the training, greedily."""

    question: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Proof:
    """`difference` is the largest of a log-probability between vLLM and peft, `tolerance` what rounding explains.

    `gain` is by how much the training raised the log-probability of a held-out token, in the mean.
    """

    difference: float
    tolerance: float
    gain: float
    right_before: int
    right_after: int
    samples: tuple[Sample, ...]
    seen: bool
    vllm: str


def path(job: Job) -> Path:
    """Return where a run keeps its proof."""
    return job.folder / "proof.json"


def read(job: Job) -> Proof:
    """Return the proof of a run; TuneError if there is none."""
    try:
        found = json.loads(path(job).read_text("utf-8"))
        return Proof(**{**found, "samples": tuple(Sample(**one) for one in found["samples"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TuneError(f"{path(job)} cannot be read ({error}); run prove first") from None


def tolerance(dtype: str) -> float:
    """Return by how much two computations in a dtype may differ: both round.

    >>> tolerance("float32")
    0.01
    """
    return 2 * canary.TOLERANCE[dtype]


def prove(job: Job) -> None:
    """Write the proof; TuneError if vLLM computes something else than peft, or the training changed nothing."""
    wanted = job.wanted
    found = figures.read(job)
    _settings(wanted.device)
    import vllm
    from vllm.lora.request import LoRARequest

    base = weights.model_dir(job.weights)
    vllm_mistral.register()
    longest = max(len(one.prompt) + max(len(one.answer), LONGEST_SAMPLE) for one in found.asked) + 1
    options: dict[str, Any] = {
        "dtype": wanted.dtype, "max_model_len": longest, "max_num_seqs": 8, "enforce_eager": wanted.device == "cpu",
        "tokenizer_mode": wanted.tokenizer_mode, "tokenizer": str(base), "hf_overrides": {"architectures": [vllm_mistral.ARCHITECTURE]},
        "load_format": "safetensors", "seed": 0, "disable_log_stats": True,
    }  # fmt: skip
    if wanted.device == "cpu":
        options["distributed_executor_backend"] = IN_THE_ENGINE
    if wanted.method == "full":
        with _engine(base, options) as llm:
            before, said_before = _asked(llm, found.asked, None)
        with _engine(job.result, options) as llm:
            after, said_after = _asked(llm, found.asked, None)
            samples = _samples(llm, found.asked, said_before, said_after)
    else:
        rank = adapters.served_rank([adapters.read(job.result, adapters.base_of(base))])
        request = LoRARequest("tuned", 1, str(job.result))
        with _engine(base, options | {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}) as llm:
            before, said_before = _asked(llm, found.asked, None)
            after, said_after = _asked(llm, found.asked, request)
            samples = _samples(llm, found.asked, said_before, said_after)
    proof = judged(found, before, after, samples, vllm.__version__)
    write_whole(path(job), (json.dumps(asdict(proof), indent=1, ensure_ascii=False) + "\n").encode())
    log.line(
        f"proven: vLLM and peft differ by {proof.difference:.2g} ({proof.tolerance:g} is allowed); answers right {proof.right_before} before, "
        f"{proof.right_after} of {len(proof.samples)} after"
    )


def judged(
    found: figures.Figures,
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    samples: tuple[Sample, ...],
    vllm: str,
) -> Proof:
    """Return the proof that follows from what vLLM said; TuneError if it contradicts peft, or the training changed nothing."""
    allowed, worst = tolerance(found.dtype), 0.0
    for what, said, expected in (
        ("the base model", before, [one.before for one in found.asked]),
        ("the result", after, [one.after for one in found.asked]),
    ):
        for got, wanted in zip(said, expected, strict=True):
            try:
                difference = canary.difference(got, wanted)
            except ValueError:
                raise TuneError(f"vLLM's log-probabilities of {what} are not finite numbers; nothing was published") from None
            if not difference <= allowed:
                raise TuneError(
                    f"vLLM does not compute {what} as peft does: a log-probability differs by {difference:.3f}, {allowed:g} is allowed; "
                    "nothing was published"
                )
            worst = max(worst, difference)
    gains = [a - b for one in found.asked for a, b in zip(one.after, one.before, strict=True)]
    if not any(gains):
        raise TuneError("the training changed nothing: every log-probability is what it was; nothing was published")
    right = [sum(getattr(sample, when).strip() == sample.expected.strip() for sample in samples) for when in ("before", "after")]
    return Proof(worst, allowed, sum(gains) / len(gains), right[0], right[1], samples, found.seen, vllm)


def _settings(device: str) -> None:
    """Set what vLLM reads from the environment: one process, off the hub."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    else:
        for name, value in NOTHING_BUILT.items():
            os.environ.setdefault(name, value)


@contextmanager
def _engine(folder: Path, options: dict[str, Any]) -> Iterator[Any]:
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = vllm.LLM(str(folder), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _asked(llm: Any, asked: Sequence[Asked], request: Any) -> tuple[list[list[float]], list[list[int]]]:
    """Return the log-probabilities of each answer, and what the model says itself to the first questions."""
    from vllm import SamplingParams

    def ask(prompts: list[list[int]], parameters: Any) -> Any:
        return llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False, lora_request=request)

    scored = ask([[*one.prompt, *one.answer] for one in asked], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    said = [
        [output.prompt_logprobs[len(one.prompt) + at][token].logprob for at, token in enumerate(one.answer)]
        for one, output in zip(asked, scored, strict=True)
    ]
    sampled = ask([list(one.prompt) for one in asked[:MOST_SAMPLES]], SamplingParams(temperature=0, max_tokens=LONGEST_SAMPLE))
    return said, [list(output.outputs[0].token_ids) for output in sampled]


def _samples(llm: Any, asked: Sequence[Asked], before: list[list[int]], after: list[list[int]]) -> tuple[Sample, ...]:
    tokenizer = llm.get_tokenizer()

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    return tuple(
        Sample(text(one.prompt), text(one.answer), text(b), text(a)) for one, b, a in zip(asked, before, after, strict=False)
    )
