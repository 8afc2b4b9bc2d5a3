"""Chats in tokens: what is learnt, what is refused, what is counted, what is shown; with Mistral's real tokenizers and a small one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from mistralctl.chats import Encoder, counted, in_colour, read_chats, show
from mistralctl.errors import Exit, UserError
from mistralctl.models import MODELS

ROOT = Path(__file__).parents[2]
V1 = ("tokenizer.model.v1", "tokenizer.model")
V2 = ("mistral_instruct_tokenizer_240216.model.v2", "tokenizer.model.v2")
V3 = ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v3")
V7 = ("mistral_instruct_tokenizer_241114.model.v7", "tokenizer.model.v7")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(folder: Path, files: tuple[str, str] = V3) -> Path:
    """A folder with one of mistral_common's tokenizers, under the name that the hub has it under."""
    import mistral_common

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(mistral_common.__file__).parent / "data" / files[0], folder / files[1])
    return folder


def small(folder: Path, template: str = TEMPLATE, eos: str = "<|im_end|>") -> Path:
    """A folder with a tokenizer of bytes, and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>", "<reserved>")])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "chat_template": template}))
    return folder


def turn(question: str, answer: str, **fields: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | fields]


SYSTEM: dict[str, object] = {"role": "system", "content": "Be brief."}
LONG_CHAT = [SYSTEM, *turn("Why?", "So."), *turn("Sure?", "Yes.")]


def write(folder: Path, *rows: list[dict[str, object]] | dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row if isinstance(row, dict) else {"messages": row}) + "\n" for row in rows))
    return file


def shown(file: Path, folder: Path, mode: Any = "mistral", **arguments: Any) -> list[str]:
    """The texts of all examples, what is learnt between {+ and +}."""
    found, encoder = counted(read_chats(file), folder, mode, **arguments)
    return [block.split("\n", 1)[1] for block in show(found, encoder, 99, colour=False).rstrip("\n").split(f"\n\n{file}:")]


def refusal(file: Path, folder: Path, mode: Any = "mistral", **arguments: Any) -> tuple[Exit, str]:
    with pytest.raises(UserError) as caught:
        counted(read_chats(file), folder, mode, **arguments)
    assert "\n" not in str(caught.value)
    return caught.value.code, str(caught.value).removeprefix(f"{file}:")


def test_every_model_of_the_table_has_a_family_whose_tokens_are_compared_over_http() -> None:
    families = json.loads((ROOT / "tests" / "plugin" / "families.json").read_text("utf-8"))
    assert sorted(name for names in families.values() for name in names) == sorted(MODELS)
    for family, names in families.items():
        assert {MODELS[name].tokenizer_mode for name in names} == {family.split(" ")[0].rstrip(",")}, family


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (V1, ["<s> [INST] Be brief.\n\nWhy? [/INST]{+ So.</s>+} [INST] Sure? [/INST]{+ Yes.</s>+}"]),
        (V7, ["<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Why?[/INST]{+ So.</s>+}[INST] Sure?[/INST]{+ Yes.</s>+}"]),
        *(
            (
                files,
                [
                    "<s>[INST] Be brief.\n\nWhy?[/INST]{+ So.</s>+}",
                    "<s>[INST] Why?[/INST] So.</s>[INST] Be brief.\n\nSure?[/INST]{+ Yes.</s>+}",
                ],
            )
            for files in (V2, V3)
        ),
    ],
    ids=["v1", "v7", "v2", "v3"],
)
def test_the_system_prompt_stands_where_the_server_puts_it(tmp_path: Path, files: tuple[str, str], wanted: list[str]) -> None:
    assert shown(write(tmp_path, LONG_CHAT), tokenizer(tmp_path / "t", files)) == wanted


def test_only_answers_with_their_end_are_learnt(tmp_path: Path) -> None:
    file = write(tmp_path, [*turn("Why?", "So.", weight=0), *turn("Sure?", "Yes."), *turn("Really?", "No.")])
    assert shown(file, tokenizer(tmp_path / "t")) == [
        "<s>[INST] Why?[/INST] So.</s>[INST] Sure?[/INST]{+ Yes.</s>+}[INST] Really?[/INST]{+ No.</s>+}"
    ]
    assert shown(file, small(tmp_path / "s"), "hf") == [
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n{+Yes.<|im_end|>+}\n<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\n{+No.<|im_end|>+}"
    ]


def test_labels_repeat_what_is_learnt_and_are_ignored_elsewhere(tmp_path: Path) -> None:
    found, encoder = counted(read_chats(write(tmp_path, turn("2+2?", "4"))), tokenizer(tmp_path / "t"), "mistral")
    [example] = found.examples
    learnt = [number for number, label in enumerate(example.labels) if label != -100]
    assert [example.labels[number] for number in learnt] == [example.input_ids[number] for number in learnt]
    assert (learnt[-1], encoder.text(example.input_ids[learnt[0] :])) == (len(example.input_ids) - 1, " 4</s>")
    assert example.input_ids[-1] == 2


def test_what_a_file_amounts_to(tmp_path: Path) -> None:
    file = write(tmp_path, {"messages": turn("2+2?", "4"), "id": 1}, LONG_CHAT)
    found, _ = counted(read_chats(file), tokenizer(tmp_path / "t"), "mistral")
    summary = found.summary
    lengths = [len(example.input_ids) for example in found.examples]
    assert (summary.file, summary.format, summary.rows, summary.examples) == (str(file), "openai", 2, 3)
    assert (summary.tokens, summary.longest, summary.longest_line) == (sum(lengths), max(lengths), 2)
    assert summary.learnt == sum(example.learnt for example in found.examples) == 9
    assert summary.ignored == ("id",)
    assert summary.by.startswith("mistral_common ")
    assert (found.lines, found.rows) == ((1, 2, 2), (0, 1, 1))
    file.write_text(json.dumps([{"messages": turn("2+2?", "4")}, {"messages": LONG_CHAT}]))
    assert (array := counted(read_chats(file), tmp_path / "t", "mistral")[0]).lines == (1, 1, 1)
    assert (array.rows, array.examples) == (found.rows, found.examples)
    said = f"1: 2 of 2 rows are longer than 5 tokens: line 1 with {max(lengths)}, line 1 with {lengths[0]}; "
    assert refusal(file, tmp_path / "t", max_length=5)[1].startswith(said)
    write(tmp_path, {"messages": turn("2+2?", "4"), "id": 1}, LONG_CHAT)
    first, _ = counted(read_chats(file), tmp_path / "t", "mistral", keep=1)
    assert (first.examples, first.lines, first.summary) == (found.examples[:1], (1,), summary)


def test_rows_that_are_too_long_are_all_counted_and_none_is_cut(tmp_path: Path) -> None:
    rows = [turn(f"Question {number}?", "word " * (100 if number % 2 else number + 1)) for number in range(30)]
    file = write(tmp_path, *rows)
    folder = tokenizer(tmp_path / "t")
    lengths = [len(example.input_ids) for example in counted(read_chats(file), folder, "mistral")[0].examples]
    assert counted(read_chats(file), folder, "mistral", max(lengths))[0].summary.longest == max(lengths)
    code, said = refusal(file, folder, max_length=50)
    assert code is Exit.USAGE
    long = [number for number, length in enumerate(lengths) if length > 50]
    assert len(long) == 15
    first = max(long, key=lambda number: lengths[number])
    assert said.startswith(f"2: 15 of 30 rows are longer than 50 tokens: line {first + 1} with {lengths[first]}, line ")
    assert counted(read_chats(file), folder, "mistral", max(lengths), keep=0)[0].summary.tokens == sum(lengths)
    assert said.endswith(" and 5 more; split or shorten them, or raise --max-length; nothing is cut")


def test_a_special_token_of_this_tokenizer_alone_is_refused_where_it_would_be_taken_as_one(tmp_path: Path) -> None:
    file = write(tmp_path, turn("Why?", "So."), turn("What is <reserved>?", "It is reserved."))
    wanted = "2: messages[0].content: '<reserved>' is a special token inside text; "
    assert refusal(file, small(tmp_path / "s"), "hf") == (
        Exit.USAGE, f"{wanted}take it out: the tokenizer would take it as one, and text must not end a turn",
    )  # fmt: skip
    assert len(shown(file, tokenizer(tmp_path / "t"))) == 2  # in Mistral's own library text is text
    file.write_text(json.dumps([{"instruction": "Why?", "output": "So <reserved>."}]))
    assert refusal(file, small(tmp_path / "s"), "hf")[1].startswith("1: [0].output: '<reserved>' is")


CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def with_call(identity: str) -> list[dict[str, Any]]:
    result = {"role": "tool", "content": "3", "tool_call_id": identity}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": identity}]}
    return [{"role": "user", "content": "1+2?"}, call, result, {"role": "assistant", "content": "3"}]


def test_calls_of_tools_go_to_tokenizers_that_have_them(tmp_path: Path) -> None:
    file = write(tmp_path, with_call("call_0123456789abcdef"))
    v3 = tokenizer(tmp_path / "t")
    assert shown(file, v3) == [
        '<s>[INST] 1+2?[/INST]{+[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "789abcdef"}]</s>+}'
        '[TOOL_RESULTS] {"content": 3, "call_id": "789abcdef"}[/TOOL_RESULTS]{+ 3</s>+}'
    ]
    assert refusal(write(tmp_path, with_call("call-1")), v3)[1] == (
        "1: messages[1].tool_calls[0].id: 'call-1' does not end with nine letters or digits, which this model's server wants; write nine of them, "
        "in its result too"
    )
    said = "1: messages[1].tool_calls: this model's tokenizer (v1) has no tools; take the row out, or train a later version"
    assert refusal(file, tokenizer(tmp_path / "one", V1))[1] == said
    assert (
        refusal(file, small(tmp_path / "s"), "hf")[1]
        == "1: messages[1].tool_calls: this model's chat template has no tools; take the row out"
    )
    both = with_call("a1b2c3d4e")
    both[1]["content"] = "I add."
    assert refusal(write(tmp_path, both), v3)[1] == (
        "1: messages[1].content: it has text and calls of tools, and this model's tokenizer (v3) takes one of them; take the text out, or write null"
    )
    assert len(shown(write(tmp_path, both), tokenizer(tmp_path / "seven", V7))) == 1
    cut = [with_call("xa1b2c3d4e"), with_call("ya1b2c3d4e")]
    assert refusal(write(tmp_path, cut[0] + cut[1]), v3)[1] == (
        "1: messages[5].tool_calls[0].id: 'ya1b2c3d4e' ends as another id, and servers keep its last 9; write another"
    )
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": 3}}}]
    said = refusal(write(tmp_path, {"messages": with_call("a1b2c3d4e"), "tools": tools}), v3)[1]
    assert said == (
        "1: tools: mistral_common does not take it (Invalid tool schema: 3 is not valid under any of the given schemas); mend the row, or take it out"
    )


@pytest.mark.parametrize(
    ("template", "eos", "said"),
    [
        ("{{ messages[0]['content'] }}", "<|im_end|>", "the chat template ends no answer with a token that ends generation"),
        (TEMPLATE, "", "the chat template ends no answer with a token that ends generation"),
        (TEMPLATE + "{% if add_generation_prompt %}think{% endif %}", "<|im_end|>", "the chat template writes an answer otherwise than behind"),
        ("{{ raise_exception('roles must alternate') }}", "<|im_end|>", "1: the chat template does not take it (roles must alternate)"),
        ("\n{% if %}", "<|im_end|>", "is wrong in line 2 (Expected an expression, got 'end of statement block'); mend it"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_trained_with(tmp_path: Path, template: str, eos: str, said: str) -> None:
    assert said in refusal(write(tmp_path, turn("Why?", "So.")), small(tmp_path / "s", template, eos), "hf")[1]


def test_an_answer_that_would_join_the_prompts_last_token_is_encoded_behind_it(tmp_path: Path) -> None:
    """As the server generates it: its prompt ends before."""
    from tokenizers import Tokenizer

    folder = small(tmp_path / "s")
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    described["model"]["vocab"]["ĊĊ"] = 300
    described["model"]["merges"] = [["Ċ", "Ċ"]]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    joined = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(joined.encode("\n\n").ids) == 1
    found, encoder = counted(read_chats(write(tmp_path, [*turn("Why?", "\n\nSo."), *turn("Sure?", "Yes.")])), folder, "hf")
    first, second = found.examples  # the next prompt has the joined token
    learnt = [label for label in first.labels if label != -100]
    prompt = encoder.text(first.input_ids[: -len(learnt)])
    assert (prompt, encoder.text(learnt)) == ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "\n\nSo.<|im_end|>")
    assert list(first.input_ids[: -len(learnt)]) == joined.encode(prompt).ids
    assert second.learnt == len("Yes.") + 1


@pytest.mark.parametrize("mode", ["mistral", "hf"])
def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path, mode: Any) -> None:
    file = write(tmp_path, turn("Why?", "So."))
    (tmp_path / "t").mkdir()
    code, said = refusal(file, tmp_path / "t", mode)
    assert code is Exit.WEIGHTS
    assert str(tmp_path / "t") in said
    (tmp_path / "t" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "t" / ("tekken.json" if mode == "mistral" else "tokenizer.json")).write_text("{}")
    code, said = refusal(file, tmp_path / "t", mode)
    assert (code, said.endswith("; take a whole copy")) == (Exit.WEIGHTS, True)


def test_two_tokenizers_that_libraries_choose_between_differently_are_named(tmp_path: Path) -> None:
    folder = small(tmp_path / "s")
    (folder / "tekken.json").write_text("{}")
    said = f"{folder} has tekken.json beside tokenizer.json, and libraries choose differently; take one of them out"
    assert refusal(write(tmp_path, turn("Why?", "So.")), folder, "hf") == (Exit.WEIGHTS, said)


@pytest.mark.parametrize(("mode", "package"), [("mistral", "mistral_common"), ("hf", "tokenizers")])
def test_a_library_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, package: str
) -> None:
    folder = small(tokenizer(tmp_path / "t"))
    for name in [name for name in sys.modules if name.startswith((f"{package}.", "mistral_chats.mistral", "mistral_chats.hf"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, said = refusal(write(tmp_path, turn("Why?", "So.")), folder, mode)
    assert (code, said) == (Exit.MACHINE, f"counting tokens needs the package {package}; pip install 'mistralctl[finetune]'")


def test_colour_is_for_terminals_unless_it_is_switched_off(tmp_path: Path) -> None:
    assert [in_colour(True, {}), in_colour(True, {"NO_COLOR": ""}), in_colour(True, {"NO_COLOR": "1"}), in_colour(False, {})] == [
        True, True, False, False,
    ]  # fmt: skip
    file = write(tmp_path, turn("Why?", "So\x1b[2J."), turn("Who?", "I."))
    found, encoder = counted(read_chats(file), small(tmp_path / "s"), "hf")
    title = f"{file}:1: example 1 of 2, {len(found.examples[0].input_ids)} tokens, 8 learnt"
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert show(found, encoder, 1, colour=True) == f"{title}\n\x1b[2m{prompt}\x1b[0m\x1b[1;32mSo\\x1b[2J.<|im_end|>\x1b[0m\n"
    assert show(found, encoder, 1, colour=False) == f"{title}\n{prompt}{{+So\\x1b[2J.<|im_end|>+}}\n"
    assert show(found, encoder, 2, colour=False).count("example ") == 2


def test_two_runs_and_another_order_of_keys_give_the_same_examples(tmp_path: Path) -> None:
    file = write(tmp_path, LONG_CHAT)
    folder = tokenizer(tmp_path / "t")
    encoder: Encoder
    first, encoder = counted(read_chats(file), folder, "mistral")
    file.write_text(json.dumps({"messages": [dict(reversed(message.items())) for message in LONG_CHAT]}))
    assert counted(read_chats(file), folder, "mistral")[0].examples == first.examples
    assert encoder.examples(read_chats(file).rows[0]) == first.examples
