"""Test sets from local files in their published formats, or from the Hugging Face hub where that can be reached.

A local set is `<folder>/<suite>.jsonl`, `.json` or `.parquet`, or a folder `<folder>/<suite>/` of such files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_pz.errors import ConfigError, CorpusError, pip_install
from megatron_pz.evaluate.suites.formats import Question, to_question
from megatron_pz.evaluate.suites.table import SUITES, Suite

ENDINGS = (".jsonl", ".json", ".parquet")


def suite_of(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return SUITES[name]
    except KeyError as error:
        raise ConfigError(f"There is no test set {name!r}; there are {', '.join(SUITES)}.") from error


def load_questions(suite: Suite, folder: Path | None) -> list[Question]:
    """All questions of a suite, in the order of its files.

    Args:
        folder: of local sets; one that is not in it, or None: the hub.

    Raises:
        CorpusError: there is no such set here and the hub does not answer, a file is damaged, or an id comes twice.
    """
    files = local_files(suite.name, folder) if folder else []
    rows = (row for file in files for row in read_rows(file)) if files else _hub_rows(suite)
    questions: dict[str, Question] = {}
    for place, row in rows:
        question = to_question(suite, row, place)
        if question.id in questions:
            if questions[question.id] == question:
                raise CorpusError(f"{place}: the question {question.id!r} stands twice in {suite.name}.")
            question = Question(
                f"{question.id}@{place}", question.text, question.target, question.options, question.category
            )
        questions[question.id] = question
    if not questions:
        raise CorpusError(f"{suite.name}: {', '.join(map(str, files)) or suite.hub} holds no question.")
    return list(questions.values())


def local_files(name: str, folder: Path) -> list[Path]:
    """Files of the set `name` under `folder`; none where it is not there."""
    single = [path for ending in ENDINGS if (path := folder / f"{name}{ending}").is_file()]
    if single:
        return single[:1]
    inside = folder / name
    return sorted(path for path in inside.rglob("*") if path.suffix in ENDINGS and path.is_file())


def read_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of a file: JSONL, a JSON list, `{"examples": [...]}` or Parquet.

    Raises:
        CorpusError: it cannot be read.
    """
    stem = file.parent.name if file.stem == "task" else file.stem
    try:
        if file.suffix == ".parquet":
            rows = _parquet_rows(file)
        elif file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8-sig").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
        else:
            found = json.loads(file.read_text(encoding="utf-8-sig"))
            rows = found["examples"] if isinstance(found, dict) and "examples" in found else found
            rows = list(rows.values()) if isinstance(rows, dict) else rows
    except (OSError, ValueError) as error:
        raise CorpusError(f"{file} cannot be read: {error}. Fetch it again.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise CorpusError(f"{file}:{number}: a {type(row).__name__} in place of an object with fields.")
        yield f"{stem}:{number}", row if "task" in row or file.stem != "task" else {**row, "task": stem}


def _parquet_rows(file: Path) -> list[Mapping[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(
            f"{file} is Parquet, and the package pyarrow is not installed: {pip_install('megatron_pz[evaluate]')}"
        ) from error
    rows: list[Mapping[str, Any]] = parquet.read_table(file).to_pylist()
    return rows


def _hub_rows(suite: Suite) -> Iterator[tuple[str, Mapping[str, Any]]]:
    way_out = (
        f"Put it as {suite.name}.jsonl, .json or .parquet into the folder that --data names "
        f"({f'published as {suite.hub}, split {suite.split}' if suite.hub else 'it is published in parts'})."
    )
    if not suite.hub:
        raise CorpusError(f"The test set {suite.name} is not among the local files. {way_out}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CorpusError(
            f"The test set {suite.name} is not among the local files, and the package `datasets`, which would fetch "
            f"it, is not installed. {way_out}"
        ) from error
    config = None if suite.hub_config == "default" else suite.hub_config
    try:
        rows = load_dataset(suite.hub, config, split=suite.split)
    except (OSError, ValueError, RuntimeError) as error:
        raise CorpusError(f"The test set {suite.name} could not be fetched: {error}. {way_out}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{suite.name}:{number}", row
