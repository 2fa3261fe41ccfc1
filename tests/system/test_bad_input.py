"""What a user can give wrongly: one message with thing, found, wanted and way out; exit code 2; an existing run untouched.

Every case is given to a run that has a checkpoint, so that there is something to lose.
"""

import json
import shutil

import pytest
from demo_runs import FLAGS, ROOT, TEXT, rows, run, tiny_policy, tree, write_text
from tokenizers import Tokenizer

LONG = " ".join(TEXT)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus") / "text.jsonl")


@pytest.fixture(scope="module")
def done(tmp_path_factory, corpus):
    """A run of one step, which every test asks to go on."""
    folder = tmp_path_factory.mktemp("done") / "run"
    assert run(folder, corpus, train_iters=1) == 0
    return folder


@pytest.fixture
def refused(done, corpus, capsys):
    """Run with wrong flags; the one message, once it is sure that nothing was touched."""

    def ask(data_path=corpus, **flags):
        before = tree(done)
        capsys.readouterr()
        assert run(done, data_path, **{"train_iters": 5, **flags}) == 2
        said = capsys.readouterr()
        assert tree(done) == before
        errors = [line for line in said.err.splitlines() if "Error: " in line]
        assert len(errors) == 1, said.err
        assert "Traceback" not in said.err
        return errors[0]

    return ask


def lines(path, *rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def test_a_missing_corpus(refused, tmp_path):
    said = refused(tmp_path / "none.jsonl")
    assert said.startswith(f"CorpusError: There is no file or folder {tmp_path / 'none.jsonl'}.")
    assert "--data-path" in said


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"text": "cut o', "a line that is not JSON"),
        (b'{"text": "\xff"}', "a line that is not UTF-8 (byte 11)"),
        (b'["text"]', "a JSON list in place of an object"),
        (b'{"body": "x"}', "no `text` among the fields ['body']"),
        (b'{"text": 3}', "`text` of type int"),
    ],
)
def test_a_malformed_line(refused, tmp_path, line, found):
    path = lines(tmp_path / "t.jsonl", {"text": TEXT[0]}, {"text": TEXT[1]}, line)
    said = refused(path)
    assert said.startswith(f"CorpusError: {path}:3: found {found}")
    assert "wanted one JSON object with a string field `text`" in said and "--skip-bad-lines" in said


def test_malformed_lines_may_be_left_out_and_are_counted(tmp_path, capsys):
    path = lines(tmp_path / "t.jsonl", *({"text": text} for text in TEXT), b"not JSON", {"body": "x"}, b"[]")
    folder = tmp_path / "run"
    assert run(folder, path, task="continue_pt", train_iters=1, skip_bad_lines=True) == 0
    counts = {"read": 4, "not_json": 1, "no_text": 1, "not_an_object": 1, "kept": 4}
    assert json.loads((folder / "run.json").read_text())["paragraphs"] == counts
    assert "4 paragraphs (4 read, 1 not_json, 1 no_text, 1 not_an_object, 4 kept)" in capsys.readouterr().out


def test_an_empty_corpus(refused, tmp_path):
    said = refused(lines(tmp_path / "t.jsonl"))
    assert f"{tmp_path / 't.jsonl'} holds no paragraph: 1 file(s) read, lines left out: none." in said
    assert "--data-path" in said
    (tmp_path / "folder").mkdir()
    assert "holds no *.jsonl file" in refused(tmp_path / "folder")


def test_paragraphs_that_are_all_longer_than_the_prompt_limit(refused, tmp_path):
    path = write_text(tmp_path / "t.jsonl", (LONG, LONG))
    said = refused(path, max_paragraph_tokens=60, max_prompt_tokens=61)
    assert said.startswith(
        f"CorpusError: {path}: None of 2 paragraphs can be played (too_long 2). Wanted: 8 to 60 tokens"
    )
    assert "prompts of at most 61" in said and "--max-paragraph-tokens" in said and "--max-prompt-tokens" in said
    shutil.copytree(FLAGS["template_dir"], tmp_path / "wordy")
    (tmp_path / "wordy" / "mask.txt").write_text("word " * 80 + "<gen>{paragraph}")
    said = refused(max_paragraph_tokens=60, max_prompt_tokens=90, template_dir=tmp_path / "wordy")
    assert "None of 4 paragraphs can be played (prompt_too_long 4)." in said and "prompts of at most 90" in said
    said = refused(max_paragraph_tokens=60, max_prompt_tokens=70, template_dir=tmp_path / "wordy")
    assert "mask.txt has 83 tokens before any text is in it and task.max_prompt_tokens is 70" in said


def test_a_paragraph_longer_than_the_prompt_limit_is_left_out_and_counted(tmp_path, capsys):
    path = write_text(tmp_path / "t.jsonl", (*TEXT, LONG))
    flags = {"max_paragraph_tokens": 60, "max_prompt_tokens": 61, "num_fixed_masks": 1}
    assert run(tmp_path / "run", path, train_iters=1, **flags) == 0
    assert "4 paragraphs (5 read, 4 kept, 1 too_long)" in capsys.readouterr().out


def test_a_prompt_limit_that_no_paragraph_can_keep(refused):
    said = refused(max_paragraph_tokens=60, max_prompt_tokens=60)
    assert "corpus.max_paragraph_tokens is 60 and task.max_prompt_tokens 60" in said and "Raise" in said


@pytest.mark.parametrize(("path", "name"), [("none.jsonl", "There is no file"), ("short.jsonl", "too_short 1")])
def test_held_out_text_that_cannot_be_used_is_found_before_anything_is_written(refused, tmp_path, path, name):
    write_text(tmp_path / "short.jsonl", ("Iron.",))
    said = refused(held_out_path=tmp_path / path, eval_interval=1)
    assert said.startswith("CorpusError: --held-out-path: ") and name in said and str(tmp_path / path) in said


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("mask.txt", "<gen>", "lacks its placeholder {paragraph} (found none in its place)"),
        ("prediction.txt", "<pred>{paragraph}", "lacks its placeholder {masked_paragraph} (found {paragraph}, which"),
    ],
)
def test_a_template_without_its_placeholder(refused, tmp_path, file, text, found):
    shutil.copytree(FLAGS["template_dir"], tmp_path / "templates")
    (tmp_path / "templates" / file).write_text(text)
    said = refused(template_dir=tmp_path / "templates")
    assert said.startswith(f"TemplateError: The template {tmp_path / 'templates' / file} {found}")
    assert "Put {" in said


def test_a_missing_template(refused, tmp_path):
    assert f"There is no template {tmp_path / 'mask.txt'}" in refused(template_dir=tmp_path)


def test_a_tokenizer_of_another_model(refused, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FLAGS["hf_model"] / name, tmp_path)
    larger = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    larger.add_tokens([f"<extra {number}>" for number in range(10)])
    larger.save(str(tmp_path / "tokenizer.json"))
    said = refused(tokenizer=tmp_path)
    assert "TokenizerError: The tokenizer has ids up to 4009 and the model 4000 embeddings (ids 0 to 3999)" in said
    assert "Set --tokenizer" in said


def test_a_tokenizer_that_is_not_there_or_has_no_chat(refused, tmp_path):
    assert "There is no folder" in refused(tokenizer=tmp_path / "none")
    assert "--prompt-style plain" in refused(prompt_style="chat", template_dir="")


def test_a_layout_that_does_not_divide(refused):
    said = refused(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, engine="sglang")
    assert said.startswith("LayoutError: 1 ranks cannot be shared out")
    assert "2 x 2 x 1 = 4" in said and "Start a multiple of 4 ranks" in said


def test_a_model_that_is_not_whole_or_not_this_run_s(refused, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(FLAGS["hf_model"], policy)
    weights = (policy / "model.safetensors").read_bytes()
    (policy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert f"ModelError: {policy / 'model.safetensors'} cannot be read" in refused(hf_model=policy)
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    said = refused(hf_model=policy, init="random")
    assert said.startswith("CheckpointError: ") and "step_000001 belongs to another model" in said
    assert "--run-dir" in said


def test_a_setting_that_is_not_there_or_not_a_number(refused, tmp_path):
    assert "no flag --trian-iters; the nearest is --train-iters" in refused(trian_iters=4)
    assert "--lr" in refused(lr="fast")
    toml = tmp_path / "c.toml"
    toml.write_text((ROOT / "examples" / "demo.toml").read_text() + "\n[transformer]\nhiden_dropout = 0.1\n")
    assert "did you mean hidden_dropout?" in refused(config=toml)


def test_a_damaged_checkpoint_names_the_whole_one(tmp_path, corpus, capsys):
    folder = tmp_path / "run"
    settings = {"task": "continue_pt", "hf_model": tiny_policy(tmp_path / "policy"), "init": "random"}
    assert run(folder, corpus, **settings, train_iters=2, save_interval=1) == 0
    newest = folder / "checkpoints" / "step_000002"
    shard = max(newest.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1])
    before = tree(folder)
    capsys.readouterr()
    assert run(folder, corpus, **settings, train_iters=3) == 2
    said = capsys.readouterr().err
    size = shard.stat().st_size
    assert f"shards/{shard.name} has {size} bytes, was written with {size + 1}" in said
    assert "step_000001 is whole: move step_000002 away" in said
    assert tree(folder) == before
    newest.rename(folder / "checkpoints" / "damaged")
    assert run(folder, corpus, **settings, train_iters=3) == 0
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]


def test_a_place_for_the_run_that_is_no_folder(tmp_path, corpus, capsys):
    (tmp_path / "file").write_text("precious")
    assert run(tmp_path / "file", corpus, train_iters=1) == 2
    assert "DiskError: " in (said := capsys.readouterr().err) and "--run-dir" in said
    assert (tmp_path / "file").read_text() == "precious"


def test_another_seed_than_the_run_was_begun_with(refused):
    said = refused(seed=77)
    assert said.startswith("ConfigError: --seed is 77") and "begun with " in said and "--run-dir" in said
