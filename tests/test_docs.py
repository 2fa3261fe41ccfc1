"""What the documents point at is there: files, headings, functions, tools."""

import re
import subprocess
from pathlib import Path

import pytest

from megatron_pz.config.load import load_config
from megatron_pz.config.rules import validate

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```", re.DOTALL)
_FUNCTION = re.compile(r"`([\w/]+\.py):(\w+)`")


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


DOCUMENTS = tracked("*.md")


def anchor(heading):
    """GitHub's name of a heading."""
    words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower()))
    return words.replace(" ", "-")


def headings(text):
    return {anchor(line.lstrip("#")) for line in _CODE.sub("", text).splitlines() if line.startswith("#")}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for match in _LINK.finditer(_CODE.sub("", text)):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), f"{name}: {target} is no https link"
            continue
        path, _, place = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} links to {target}, which is not there"
        if place and file.suffix == ".md":
            assert place in headings(file.read_text(encoding="utf-8")), f"{name}: {target} is no heading there"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_functions_that_are_named_with_their_file_are_in_it(name):
    for file, function in _FUNCTION.findall((ROOT / name).read_text(encoding="utf-8")):
        code = (ROOT / "megatron_pz" / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(?:async )?(?:def|class) {function}\b", code, re.MULTILINE), (
            f"{name}: {file}:{function}"
        )


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tools_and_scripts_that_a_command_names_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for script in re.findall(r"(?<![\w/.])((?:tools|examples|benchmarks)/[\w/.-]+\.(?:py|sh|toml|sbatch))\b", text):
        assert (ROOT / script).is_file(), f"{name} names {script}, which is not there"


def test_the_tutorial_s_settings_load_and_its_jobs_flags_are_known(tmp_path):
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (settings,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "first.toml").write_text(settings.replace('"examples/', f'"{ROOT}/examples/'), encoding="utf-8")
    jobs = re.findall(r"^CONFIG=first\.toml sbatch .*train\.sbatch(.*)$", text, re.MULTILINE)
    assert len(jobs) == 3
    for flags in jobs:
        validate(load_config([str(tmp_path / "first.toml"), *flags.split()]), world_size=8)


def test_decisions_are_numbered_without_a_gap_and_say_what_would_change_our_mind():
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04d}" for number in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {page.name[:4]} "), page.name
        for part in ("**Context.**", "**Choice", "**What would change our mind.**"):
            assert part in text, f"{page.name} has no {part}"


def test_decisions_that_the_code_points_at_are_there():
    numbers = {page.name[:4] for page in (ROOT / "docs" / "decisions").glob("*.md")}
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in tracked("megatron_pz/*.py"))
    named = set(re.findall(r"docs/decisions/(\d{4})", code))
    assert named and named <= numbers
