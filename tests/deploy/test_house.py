"""The picture of the house in docs/architecture.md is drawn from the source as it is."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
from mistralctl import package_dir

DOCS = package_dir("model").parent / "docs"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "draw_house.py"))


def test_the_picture_is_what_the_source_says(script: dict[str, Any]) -> None:
    assert (DOCS / "house.svg").read_text("utf-8") == script["draw"](), "run make house, look at docs/house.svg, commit it"


def test_an_import_that_another_implies_is_not_drawn(script: dict[str, Any]) -> None:
    edges = {"cli": {"plan", "fit", "spec"}, "plan": {"fit", "spec"}, "fit": {"spec"}, "spec": set()}
    assert script["reduced"](edges) == {"cli": {"plan"}, "plan": {"fit"}, "fit": {"spec"}, "spec": set()}


def test_every_import_of_a_circle_is_drawn(script: dict[str, Any]) -> None:
    edges = {"cli": {"a"}, "a": {"b"}, "b": {"a"}}
    assert script["reduced"](edges) == edges


def test_a_line_of_code_is_neither_blank_nor_a_comment() -> None:
    assert runpy.run_path(str(DOCS / "count_lines.py"))["count"]("# a\n\nx = 1  # b\n    # c\n  y\n") == 2
