"""What is made for a node's first start while its weights are still on their way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import vllm_mistral
from mistral_node import ward
from vllm.model_executor.models import registry

MODEL = Path(__file__).parents[2] / "model"


def test_vllm_looks_at_our_class_once_for_an_environment_and_not_again_as_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, home = tmp_path / "env", tmp_path / "home"
    python = environment / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    script = MODEL / "node" / "byte_code.sh"
    subprocess.run(["bash", script, "cpu", environment, MODEL / "plugin"], check=True, timeout=300)
    assert (environment / ".byte-code").exists()

    monkeypatch.setattr(sys, "prefix", str(environment))
    ward.remind({"HOME": str(home)})
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(home / ".cache" / "vllm"))
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: pytest.fail("vLLM looked at the class again"))
    vllm_mistral.register()
    found = registry.ModelRegistry.models[vllm_mistral.ARCHITECTURE].inspect_model_cls()
    assert found.architecture == vllm_mistral.ARCHITECTURE
    assert found.is_text_generation_model

    [file] = (home / ".cache" / "vllm" / "modelinfos").iterdir()
    file.write_text("what a later version of the class is")
    ward.remind({"HOME": str(home)})
    assert file.read_text() == "what a later version of the class is"
