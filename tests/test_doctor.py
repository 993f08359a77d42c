"""`vllm-dejavu doctor`: vLLM takes any --model-impl, so only this tells whether ours would have an effect."""

import os
import subprocess
import sys

import pytest
from conftest import HANG_S

BREAK = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise ImportError("broken on purpose")
sys.meta_path.insert(0, Broken())
"""


def doctor(**env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}
    return subprocess.run(
        [sys.executable, "-m", "vllm_dejavu.cli", "doctor"],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def test_healthy_installation():
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OPTForCausalLM with --model-impl dejavu -> DejaVuOPTForCausalLM" in done.stdout
    for name in ("vllm", "torch", "triton", "transformers", "device", "kernels"):
        assert any(line.startswith(name) for line in done.stdout.splitlines()), name


def test_plugin_not_allowed_by_vllm_plugins():
    done = doctor(VLLM_PLUGINS="another")
    assert done.returncode == 1
    assert "VLLM_PLUGINS" in done.stdout and "would NOT take effect" in done.stdout


@pytest.mark.parametrize(
    "module", ["vllm_dejavu.plugin", pytest.param("vllm_dejavu.models.opt", marks=pytest.mark.on_demand)]
)
def test_broken_plugin_is_reported_with_its_error(tmp_path, module):
    """vLLM only logs a plugin that fails to import, and goes on with its own OPT."""
    (tmp_path / "sitecustomize.py").write_text(BREAK.format(module=module))
    done = doctor(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert (
        "broken on purpose" in done.stdout
        and "Reinstall" in done.stdout
        and "would NOT take effect" in done.stdout
    )


def test_plugin_not_installed(tmp_path, monkeypatch):
    from vllm_dejavu import inspection

    monkeypatch.setattr(inspection.importlib.metadata, "entry_points", lambda group: [])
    report, healthy = inspection.diagnose()
    assert not healthy and "no entry point" in report and "pip install" in report
