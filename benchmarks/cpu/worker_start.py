"""What a worker of the corpus tool takes until it is ready for its first batch: CPU-seconds, bytes. `corpus.py` calls it, for a spawned
process imports its parent's script too, and that one imports much.

Usage: worker_start.py TOKENIZER
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import psutil

from megatron_pz.corpus.encoder import encoder_maker
from megatron_pz.corpus.extract import Extractor, PrepareSettings
from megatron_pz.corpus.workers import elsewhere
from megatron_pz.types import Encoder


def begun(make_encoder: Callable[[], Encoder]) -> dict[str, float]:
    """CPU-seconds and memory of this process once it has an extractor."""
    Extractor(PrepareSettings(sys.argv[1]), make_encoder).tokenizer.encode("The first call makes its tables.")
    held = psutil.Process().memory_info()
    return {"cpu": time.process_time(), "resident": float(held.rss), "anonymous": float(held.rss - held.shared)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(elsewhere(begun, encoder_maker(sys.argv[1]))) + "\n")
