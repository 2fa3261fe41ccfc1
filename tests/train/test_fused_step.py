"""The trainer with the fused log-probs beside the chunked ones: a real update of a tiny Qwen3 by Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_an_update_with_the_fused_kernel_is_the_chunked_one():
    run = subprocess.run(
        [sys.executable, HERE / "fused_step_worker.py"],
        env=os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    apart = json.loads(run.stdout.strip().splitlines()[-1])
    assert apart["moved"] > 1e-3  # there was something to agree about
    assert apart["metrics"] < 1e-5 and apart["gradients"] < 1e-5  # float32
    assert apart["weights"] < 1e-4  # a hundredth of the learning rate: Adam makes much of the noise in tiny gradients
