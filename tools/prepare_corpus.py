"""Make a corpus store of Wikipedia dumps, Parquet, JSONL, text files or folders of them.

    python tools/prepare_corpus.py enwiki-pages-articles.xml.bz2 corpus/en --tokenizer Qwen/Qwen3-4B-Base --workers 16
    python tools/prepare_corpus.py mathpile/ corpus/math --tokenizer FOLDER --evaluation math500.jsonl --licence "CC BY-NC-SA 4.0"

OUT appears when it is complete; after a kill the same command goes on where it was. Then: [corpus] data_path = "OUT" and
held_out_path = "OUT/held_out". docs/corpus.md tells the format. Exit status: 0, 2 after an error, 3 where a source was broken
(what stood before the break is kept).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_pz.corpus.extract import PrepareSettings
from megatron_pz.corpus.prepare import prepare
from megatron_pz.errors import MegatronPZError


def main(argv: Sequence[str]) -> int:
    given = arguments(argv)
    begun = time.monotonic()

    def tell(batches: int, size: int) -> None:
        seconds = time.monotonic() - begun
        sys.stderr.write(f"\r{batches} batches, {size / 1e6:.0f} MB, {size / 1e6 / seconds:.2f} MB/s ")

    settings = PrepareSettings(
        given.tokenizer,
        given.min_tokens,
        given.max_tokens,
        given.language,
        given.held_out,
        given.seed,
        tuple(given.evaluation),
        given.ngram,
    )
    try:
        card = prepare(given.sources, given.out, settings, num_workers=given.workers, licence=given.licence, tell=tell)
    except MegatronPZError as error:
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        return 2
    sys.stderr.write("\n")
    sys.stdout.write(
        f"{given.out}: {card['train']['paragraphs']} paragraphs, {card['held_out']['paragraphs']} held out\n"
    )
    for line in card["broken"]:
        sys.stderr.write(f"broken source: {line}\n")
    return 3 if card["broken"] else 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = PrepareSettings("")
    parser.add_argument("sources", metavar="SOURCE", type=Path, nargs="+", help="files or folders")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to be made")
    parser.add_argument("--tokenizer", required=True, help="folder, hub name or .model file; lengths are in its tokens")
    parser.add_argument("--min-tokens", type=int, default=default.min_tokens)
    parser.add_argument("--max-tokens", type=int, default=default.max_tokens)
    parser.add_argument("--language", default="", help="of the filters, e.g. ko; a dump tells its own")
    parser.add_argument("--held-out", type=float, default=default.held_out, help="share of documents that is held out")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the held-out split")
    parser.add_argument(
        "--evaluation", nargs="*", default=[], help="files of test sets; paragraphs that share an n-gram go"
    )
    parser.add_argument("--ngram", type=int, default=default.ngram, help="words of that n-gram")
    parser.add_argument(
        "--licence", default="", help="attribution and licence of the text, where the source tells none"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes beside the one that reads")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
