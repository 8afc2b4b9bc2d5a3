"""Labels, whatever a deployment is called, are such as each cloud accepts: by the clouds' own rules, and by SkyPilot's check of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistralctl import checkpoints, owners, plan
from mistralctl.clouds import names
from mistralctl.config import load
from mistralctl.errors import UserError
from mistralctl.models import MODELS
from mistralctl.tasks import mirror, serve


@dataclass(frozen=True)
class Rules:
    """What a cloud accepts: whole keys and values, and how many of them."""

    key: str
    value: str
    most: int


RULES = {
    # https://docs.aws.amazon.com/tag-editor/latest/userguide/best-practices-and-strats.html (letters, digits and _ . : / = + - @)
    "aws": Rules(r"(?!aws:)[\w .:/=+@-]{1,128}", r"[\w .:/=+@-]{0,256}", 50),
    # https://cloud.google.com/compute/docs/labeling-resources (small letters, digits, _ and -; a key begins with a letter)
    "gcp": Rules(r"[a-z][a-z0-9_-]{0,62}", r"[a-z0-9_-]{0,63}", 64),
    # https://learn.microsoft.com/azure/azure-resource-manager/management/tag-resources (no < > % & \ ? /)
    "azure": Rules(r"(?!(?:microsoft|azure|windows))[^<>%&\\?/]{1,512}", r".{0,256}", 50),
}
SKYPILOTS_OWN = 10  # it adds fewer: name, user, cluster


def accepted(labels: dict[str, str]) -> None:
    import sky.clouds

    for cloud, rules in RULES.items():
        skypilots = {"aws": sky.clouds.AWS, "gcp": sky.clouds.GCP, "azure": sky.clouds.Azure}[cloud]
        assert len(labels) + SKYPILOTS_OWN <= rules.most
        for key, value in labels.items():
            assert re.fullmatch(rules.key, key), (cloud, key)
            assert re.fullmatch(rules.value, value), (cloud, key, value)
            assert skypilots.is_label_valid(key, value) == (True, None)


def labels(owner: str, model: str | None = None, **flags: Any) -> dict[str, str]:
    sourced = load({"cloud": ["aws", "gcp", "azure"], "accelerators": "A100-80GB:1"} | flags, {}, None)
    row = checkpoints.resolve(sourced)
    made = plan.make(sourced, row if model is None else replace(row, name=model), None)
    found: dict[str, str] = serve.render(made, owner=owners.current({"MISTRALCTL_OWNER": owner}))["resources"]["labels"]
    return found


def test_there_are_rules_for_every_cloud() -> None:
    assert set(RULES) == set(names())


@pytest.mark.parametrize("model", MODELS)
def test_every_model_of_the_table(model: str) -> None:
    accepted(labels("me", model=model))


@given(st.text(min_size=1), st.text(min_size=1), st.sampled_from(["never", "1m", "36h", "365d"]))
@settings(max_examples=100, deadline=None)
def test_whatever_the_model_and_the_owner_are_called(model: str, owner: str, ttl: str) -> None:
    accepted(labels(owner, model=model, ttl=ttl))


@given(st.one_of(st.text(min_size=1, max_size=60), st.from_regex(r"[a-zA-Z0-9_.-]{1,60}", fullmatch=True)))
@settings(max_examples=100, deadline=None)
def test_a_name_that_is_given_is_accepted_by_all_or_refused_here(name: str) -> None:
    try:
        found = labels("me", name=name)
    except UserError:
        return  # one line says what a name looks like: test_config.py
    assert found["mistralctl-name"] == name
    accepted(found)


def test_a_mirrors_machine() -> None:
    spec = mirror.checked(mirror.MirrorSpec("hf://mistralai/Mistral-7B-Instruct-v0.1", "gs://My_Bucket.example/v01"))
    accepted(mirror.render(spec, owner=owners.current({"MISTRALCTL_OWNER": "me"}))["resources"]["labels"])
