"""Memory above the model's own that a push takes, by one transport: prints bytes.

memory_worker.py TRANSPORT BUCKET_MIB URL FOLDER

FOLDER holds config.json; the weights are random. The peak is Linux's own count of resident pages, which knows of all
allocators.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

import torch  # noqa: E402

from megatron_pz.config.schema import CheckpointConfig, Config, EngineConfig, ModelConfig, SGLangConfig  # noqa: E402
from megatron_pz.engine.sglang.client import Client  # noqa: E402
from megatron_pz.engine.sglang.control import Control  # noqa: E402
from megatron_pz.engine.sglang.io_thread import IoThread  # noqa: E402
from megatron_pz.models.policy import build_policy  # noqa: E402
from megatron_pz.sync.push import WeightPush  # noqa: E402
from megatron_pz.train.engines import make_transport  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402


def resident(kind: str) -> int:
    """Bytes: `VmRSS` now, `VmHWM` at most since `forget_peak`."""
    (found,) = re.findall(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    torch.set_num_threads(1)
    transport, bucket_mib, url, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    with tempfile.TemporaryDirectory() as run_dir:
        config = Config(
            model=ModelConfig(hf_model=str(folder), init="random"),
            engine=EngineConfig(engine="sglang"),
            checkpoint=CheckpointConfig(run_dir=run_dir),
            sglang=SGLangConfig(weight_transport=transport, weight_bucket_mib=bucket_mib),  # type: ignore[arg-type]
        )
        parallel = init_parallel(config.parallel, PLATFORM, 1)
        hf = json.loads((folder / "config.json").read_text())
        model = build_policy(hf, config, PLATFORM)
        for parameter in model.parameters():
            parameter.data.fill_(0.5)  # all pages are there
        small = build_policy(hf | {"num_hidden_layers": 1}, config, PLATFORM)
        io = IoThread()
        control = Control(Client(url, "", vocab_size=hf["vocab_size"], context_length=64))
        push = WeightPush(make_transport(config, parallel, folder, io), io, [control], "retract")
        assert push([small], 1, [0]) == [], push.last  # imports, joins groups, opens connections
        forget_peak()
        before = resident("VmRSS")
        assert push([model], 2, [0]) == [], push.last
        sys.stdout.write(f"{resident('VmHWM') - before} {push.last.num_bytes if push.last else 0}\n")
        io.run(control.client.close())
        io.close()
        shutdown()


if __name__ == "__main__":
    main()
