"""vLLM's processes import without the garbage collector and run with it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
import runpy
import mistral_node.start
print(gc.isenabled())  # who only imports it keeps the collector
runpy.run_module("mistral_node.start", run_name="__mp_main__")  # what a process does first that vLLM spawns
print(gc.isenabled())
import vllm.plugins
vllm.plugins.load_general_plugins()
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


def test_the_collector_is_off_until_vllm_has_loaded_our_plugin() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.split() == ["True", "False", "True", "True"]


def test_a_process_that_another_one_spawns_runs_its_main_module_first() -> None:
    """Python's own promise, on which start.py builds: with `spawn`, as on a CPU, a child begins with the module of `-m`."""
    child = "import gc; print(gc.isenabled())"
    program = f"""
import multiprocessing, runpy, sys
import mistral_node.start
main = sys.modules["__main__"]
main.__spec__ = mistral_node.start.__spec__
multiprocessing.get_context("spawn").Process(target=exec, args=({child!r},)).start()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.split() == ["False"], done.stderr
