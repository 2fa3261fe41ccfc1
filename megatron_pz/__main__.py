"""`python -m megatron_pz CONFIG.toml [--field value ...]` trains; see `megatron_pz.train.launch`.

`python -m megatron_pz doctor CONFIG.toml ...` tells what would fail; see `megatron_pz.doctor.examine`.
"""

import os
import sys
import time

from megatron_pz.errors import GRACE_S, VersionError
from megatron_pz.platform.versions import check_versions


def main() -> int:
    """Exit status of the run; 2 where the environment is not a supported one."""
    if sys.argv[1:2] == ["doctor"]:
        from megatron_pz.doctor import examine

        return examine.main(sys.argv[2:])
    try:
        check_versions()
    except VersionError as error:
        if int(os.environ.get("LOCAL_RANK", "0")):
            time.sleep(GRACE_S)
        else:  # nodes may differ
            who = f"rank {rank}: " if (rank := os.environ.get("RANK", "0")) != "0" else ""
            sys.stderr.write(f"{who}{type(error).__name__}: {error}\n")
        return 2
    from megatron_pz.train import launch  # other versions may fail on the way

    return launch.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
