"""Score models on the paper's test sets, with intervals, and write one JSON, one table and curves over checkpoints.

    python tools/evaluate.py --out OUT --suites paper --hf-model Qwen/Qwen3-4B-Base          the embedded engine
    python tools/evaluate.py --out OUT --suites math500,gsm8k --run-dir runs/mine            each checkpoint of a run
    python tools/evaluate.py --out OUT --suites bbeh --config RUN.toml -- --server-urls http://node1:30000   SGLang servers
    python tools/evaluate.py --out OUT --suites gsm8k --url http://host:8000 [--api completions]   any server like OpenAI's

Test sets come from --data FOLDER (<suite>.jsonl, .json, .parquet) or from the Hugging Face hub. Started again with the same
--out it goes on where it was: responses are kept under the weights, the prompt and the sampling they came from.
`torchrun` shares a model that is too large for one device (flags of the layout behind `--`). docs/evaluation.md says the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megatron_pz.config.command_line import override
from megatron_pz.config.load import load_config
from megatron_pz.config.schema import Config
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.engine.openai_url import OpenAIServers
from megatron_pz.engine.sglang.attached import attached
from megatron_pz.engine.sglang.specs import read_key, server_urls
from megatron_pz.errors import CheckpointError, ConfigError, MegatronPZError
from megatron_pz.evaluate.examine import Examination, Progress, examine, prepare
from megatron_pz.evaluate.responses import Answer, Kept, engine_answer, url_answer
from megatron_pz.evaluate.results import JSON_FILE, TABLE_FILE, Examined, write_results
from megatron_pz.evaluate.score import SuiteScore
from megatron_pz.evaluate.suites.table import PAPER
from megatron_pz.grade.judge import Judge
from megatron_pz.models.folder import read_hf_config, resolve_folder
from megatron_pz.report.jsonl import JsonLines
from megatron_pz.types import Generate

RESPONSES_FILE, GRADED_FILE = "responses.jsonl", "graded.jsonl"
_STEP = re.compile(r"step_(\d+)")


def main(argv: Sequence[str]) -> int:
    """See the module; 0 when all is scored, 2 after an error that a user can mend."""
    own, run_flags = _split(argv)
    args = _parser().parse_args(own)
    try:
        examined = _examined(args, run_flags)
    except MegatronPZError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    if examined:
        how = {name: str(value) for name, value in vars(args).items() if value is not None}
        os.replace(args.out / f".tmp-{GRADED_FILE}", args.out / GRADED_FILE)
        write_results(args.out, examined, how | {"run_flags": run_flags})
        print((args.out / TABLE_FILE).read_text(encoding="utf-8"))
        print(f"{args.out / JSON_FILE}; each answer with its verdicts in {args.out / GRADED_FILE}")
    return 0


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--hf-model", nargs="+", help="Hugging Face folders or hub names")
    what.add_argument("--run-dir", type=Path, help="a run: its config.toml and its checkpoints")
    what.add_argument("--config", help="a run's TOML file: its servers where `server_urls` is set, else its hf_model")
    what.add_argument("--url", nargs="+", help="servers that speak OpenAI's HTTP")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results and of all responses")
    parser.add_argument("--suites", required=True, help="names separated by commas, or `paper` for its nine")
    parser.add_argument("--data", type=Path, help="folder of test sets; what is not there comes from the hub")
    parser.add_argument(
        "--prompts", type=Path, help="folder with <suite>.txt or <kind>.txt in place of the own prompts"
    )
    parser.add_argument("--limit", type=int, help="only the first so many questions of each set")
    parser.add_argument("--samples", default="", help="answers a question, e.g. amc23=32,aime24=8; 1 is greedy")
    parser.add_argument("--temperature", type=float, help="of sets that are sampled (theirs: 1.0)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--at-once", type=int, default=256, help="requests under way")
    parser.add_argument("--grading-limit-s", type=float, default=5.0, help="for one comparison")
    parser.add_argument("--steps", help="--run-dir: only these checkpoints, e.g. 1000,2000")
    parser.add_argument(
        "--prompt-style", choices=["chat", "plain"], help="frame of a prompt (theirs: chat, or the run's)"
    )
    parser.add_argument("--api", choices=["chat", "completions"], default="chat", help="--url: which of its two ways")
    parser.add_argument("--model", default="", help="--url: the model's name there, if not its first")
    parser.add_argument("--api-key-file", default="", help="--url: file with the key")
    return parser


def _examined(args: argparse.Namespace, run_flags: list[str]) -> list[Examined]:
    """Results of each model; empty on ranks other than 0."""
    is_rank0 = os.environ.get("RANK", "0") == "0"
    examination = prepare(
        PAPER if args.suites == "paper" else args.suites.split(","),
        data=args.data,
        prompts=args.prompts,
        limit=args.limit,
        num_samples=_samples(args.samples),
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        top_p=args.top_p,
        seed=args.seed,
        at_once=args.at_once,
    )
    with ExitStack() as stack:
        desk = Desk(args, examination, stack) if is_rank0 else None
        if args.url:
            assert desk is not None
            return [_by_url(args, desk)]
        if args.config:
            config = load_config([args.config, *run_flags])
            if server_urls(config):
                assert desk is not None
                return [asyncio.run(_by_servers(args, config, desk))]
            return _by_policy(args, config, [None], desk)
        if args.run_dir:
            config = load_config([str(args.run_dir / "config.toml"), *run_flags])
            return _by_policy(args, config, _checkpoints(args.run_dir, args.steps), desk)
        found = []
        for name in args.hf_model:
            flags = override(Config(), run_flags)
            config = dataclasses.replace(flags, model=dataclasses.replace(flags.model, hf_model=name))
            found += _by_policy(args, config, [None], desk)
        return found


class Desk:
    """Where responses are kept and graded; rank 0's."""

    def __init__(self, args: argparse.Namespace, examination: Examination, stack: ExitStack) -> None:
        self.examination = examination
        self.kept = Kept(args.out / RESPONSES_FILE)
        stack.callback(self.kept.close)
        partial = args.out / f".tmp-{GRADED_FILE}"
        partial.unlink(missing_ok=True)
        self.graded = JsonLines(partial)
        stack.callback(self.graded.close)
        self.judge = stack.enter_context(Judge(args.grading_limit_s, num_workers=2))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = stack.enter_context(Bar(*columns, console=Console(stderr=True)))

    async def examine(self, label: str, model: str, answer: Answer) -> dict[str, SuiteScore]:
        """Scores of one model."""
        task = self.bar.add_task(label, total=self.examination.num_asks)
        progress = Progress(
            landed=lambda count: self.bar.advance(task, count),
            grading=lambda suite: self.bar.update(task, description=f"{label} {suite}"),
            row=lambda row: self.graded.append([row]),
        )
        return await examine(self.examination, model, answer, self.kept, self.judge, progress)


def _by_url(args: argparse.Namespace, desk: Desk) -> Examined:
    servers = OpenAIServers(args.url, api=args.api, model=args.model, api_key=read_key(args.api_key_file))
    label = servers.model_name()
    name = f"{label} at {','.join(args.url)} by {args.api}"
    with ThreadPoolExecutor(args.at_once) as threads:
        return Examined(label, name, None, asyncio.run(desk.examine(label, name, url_answer(servers, threads))))


async def _by_servers(args: argparse.Namespace, config: Config, desk: Desk) -> Examined:
    folder = resolve_folder(config.model.hf_model)
    hf_config = read_hf_config(folder)
    tokenizer = load_tokenizer(config.model.tokenizer or folder)
    longest = _longest(hf_config)
    style = args.prompt_style or config.task.prompt_style
    async with attached(config, hf_config, longest, lambda line: print(line, file=sys.stderr)) as (generate, name):
        answer = engine_answer(generate, tokenizer, style, longest)
        return Examined(name, name, None, await desk.examine(name, f"{name} {style}", answer))


def _by_policy(
    args: argparse.Namespace, config: Config, checkpoints: Sequence[Path | None], desk: Desk | None
) -> list[Examined]:
    from megatron_pz.train.answer import with_each_policy  # torch and Megatron: only where they are used

    folder = resolve_folder(config.model.hf_model)
    tokenizer = load_tokenizer(config.model.tokenizer or folder)
    style, longest = args.prompt_style or config.task.prompt_style, _longest(read_hf_config(folder))

    async def ask(checkpoint: Path | None, name: str, generate: Generate) -> Examined:
        assert desk is not None
        label = checkpoint.name if checkpoint else str(config.model.hf_model)
        answer = engine_answer(generate, tokenizer, style, longest)
        scores = await desk.examine(label, f"{name} {style}", answer)
        return Examined(label, name, _step(checkpoint), scores)

    return [one for one in with_each_policy(config, checkpoints, ask) if one is not None]


def _longest(hf_config: Mapping[str, Any]) -> int:
    return int(hf_config.get("max_position_embeddings") or 10**9)


def _checkpoints(run_dir: Path, steps: str | None) -> list[Path | None]:
    found = {step: path for path in (run_dir / "checkpoints").glob("step_*") if (step := _step(path)) is not None}
    wanted = [int(step) for step in steps.split(",")] if steps else sorted(found)
    if missing := [step for step in wanted if step not in found]:
        raise CheckpointError(f"{run_dir} has no checkpoint of step {missing}; it has those of {sorted(found)}.")
    if not wanted:
        raise CheckpointError(f"{run_dir}/checkpoints holds no checkpoint. Give its hf/ folder to --hf-model.")
    return [found[step] for step in wanted]


def _step(checkpoint: Path | None) -> int | None:
    found = _STEP.fullmatch(checkpoint.name) if checkpoint else None
    return int(found[1]) if found else None


def _samples(text: str) -> dict[str, int]:
    pairs: dict[str, Any] = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    if text and (not pairs or not all(str(count).isdigit() and int(count) > 0 for count in pairs.values())):
        raise ConfigError(f"--samples is {text!r}; wanted suites with counts, e.g. amc23=32,aime24=8.")
    return {name: int(count) for name, count in pairs.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
