"""Each patch of the shim is needed by the installed Megatron-Core, and does what it is there for.

Run in processes of their own: the shim is for ever, and the stock targets must be seen too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

PROBES = """
import json, sys, warnings
warnings.simplefilter("ignore")
from megatron_pz.platform import engineless, shim, transformer_engine
from megatron_pz.platform.patch import patches_of
transformer_engine.hide()
patches = patches_of([*shim.PATCHES, *engineless.PATCHES])

def outcomes():
    found = {}
    for patch in patches:
        try:
            patch.probe()
            found[patch.target] = ""
        except Exception as error:
            found[patch.target] = f"{type(error).__name__}: {error}"
    return found

stock = outcomes()
engineless.install()
without_shim = outcomes()
shim.install()
first = {patch.target: getattr(*patch.owner()) for patch in patches}
shim.install()
again = {patch.target: getattr(*patch.owner()) for patch in patches}
print(json.dumps({
    "stock": stock,
    "without_shim": without_shim,
    "shimmed": outcomes(),
    "of_engineless": [patch.target for patch in engineless.PATCHES],
    "once": all(first[t] is again[t] for t in first),
}))
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def outcomes():
    done = python(PROBES)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="stock torch.cuda works on this machine")
def test_every_patch_is_still_needed(outcomes):
    idle = [target for target, error in outcomes["stock"].items() if not error]
    assert not idle, f"these work unpatched and can leave the table, or their version range ends: {idle}"


def test_no_target_has_vanished_and_every_patch_works(outcomes):
    broken = {target: error for target, error in outcomes["shimmed"].items() if error}
    assert not broken
    assert len(outcomes["shimmed"]) > 30


def test_a_gpu_without_transformer_engine_gets_its_part_of_the_patches_alone(outcomes):
    mended = {target for target, error in outcomes["without_shim"].items() if not error}
    needed = {target for target, error in outcomes["stock"].items() if error}
    # Where torch has no CUDA all of the shim's own still fail.
    assert mended & needed == needed & set(outcomes["of_engineless"])


def test_installing_twice_replaces_nothing_twice(outcomes):
    assert outcomes["once"]


def test_every_patch_gives_a_reason_and_versions_that_include_one_supported():
    from megatron_pz.platform import engineless, shim
    from megatron_pz.platform.patch import patches_of

    patches = [*shim.PATCHES, *engineless.PATCHES]
    assert all(patch.reason for patch in patches)
    assert len({patch.target for patch in patches}) == len(patches)
    in_016, in_019 = ({patch.target for patch in patches_of(patches, version)} for version in ("0.16.1", "0.19.2"))
    assert in_016 - in_019 == {"megatron.core.transformer.moe.moe_utils:te_general_gemm"}
    assert in_016 | in_019 == {patch.target for patch in patches}


def test_a_half_installed_transformer_engine_does_not_stop_the_cpu(tmp_path):
    broken = tmp_path / "transformer_engine"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise FileNotFoundError('no shared object of the torch extension')\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from megatron_pz.platform.select import select_platform
select_platform("cpu")
import megatron.core
from megatron.core.models.gpt import GPTModel
print("imported")
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "imported" in done.stdout
    assert "not installed" not in done.stderr  # the local layers are wanted: their absence is no news


def test_a_broken_transformer_engine_is_described_and_hidden(tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text("raise OSError('libnccl.so.2: cannot open')\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from megatron_pz.platform import transformer_engine
print(transformer_engine.fault())
try:
    import transformer_engine as te
except ImportError:
    print("hidden")
"""
    done = python(code)
    assert done.stdout.splitlines() == [
        "importing transformer_engine.pytorch failed: OSError: libnccl.so.2: cannot open",
        "hidden",
    ], done.stderr[-2000:]


def test_the_cuda_platform_mends_megatron_where_transformer_engine_is_missing():
    code = """
import torch
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 1, lambda index: None
from megatron_pz.platform import engineless, transformer_engine
transformer_engine.hide()
from megatron_pz.platform.cuda import CudaPlatform
CudaPlatform().install()
for patch in engineless.PATCHES:
    patch.probe()
print("mended")
"""
    done = python(code)
    assert done.stdout.splitlines() == ["mended"], done.stderr[-2000:]
    assert "not installed" not in done.stderr
