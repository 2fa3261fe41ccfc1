"""Settings read from TOML and overridden by flags (config/load.py, tables.py, command_line.py)."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.config.command_line import flags
from megatron_pz.config.load import load_config, read_config, to_toml
from megatron_pz.config.schema import Config, TaskConfig, TrainConfig
from megatron_pz.config.tables import SECTIONS
from megatron_pz.errors import ConfigError


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_an_empty_file_gives_the_defaults(toml):
    assert load_config([toml("")]) == Config()


def test_a_flag_beats_the_file_and_the_file_beats_the_default(toml):
    path = toml("[train]\nlr = 1e-4\nseed = 3\n")
    config = load_config([path, "--lr", "1e-6"])
    assert (config.train.lr, config.train.seed, config.train.clip_grad) == (1e-6, 3, 1.0)


def test_a_flag_may_be_spelled_with_underscores_or_an_equals_sign(toml):
    config = load_config([toml(""), "--train_iters=7", "--tensor-model-parallel-size", "2"])
    assert (config.train.train_iters, config.parallel.tensor_model_parallel_size) == (7, 2)


def test_a_boolean_is_a_flag_or_its_no_form(toml):
    config = load_config([toml(""), "--sequence-parallel", "--no-tensorboard"])
    assert config.parallel.sequence_parallel is True
    assert config.report.tensorboard is False


def test_a_boolean_with_a_value_is_refused(toml):
    with pytest.raises(ConfigError, match=r"'True' after --sequence-parallel.*--no-flag"):
        load_config([toml(""), "--sequence-parallel", "True"])


def test_an_int_in_toml_is_taken_for_a_float(toml):
    config = load_config([toml("[train]\nlr = 1\n")])
    assert config.train.lr == 1.0 and isinstance(config.train.lr, float)


def test_a_file_adds_to_its_base_key_by_key(tmp_path):
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "paper.toml").write_text("[train]\nlr = 1e-4\nseed = 3\n[server]\ntp-size = 2\n")
    (tmp_path / "bases" / "node.toml").write_text('base = "paper.toml"\n[train]\nseed = 4\n[task]\ntask = "sft"\n')
    path = tmp_path / "run.toml"
    path.write_text('base = "bases/node.toml"\n[train]\ntrain_iters = 9\n[server]\npage-size = 1\n')
    config = load_config([str(path), "--seed", "5"])
    assert (config.train.lr, config.train.seed, config.train.train_iters, config.task.task) == (1e-4, 5, 9, "sft")
    assert config.server == {"tp-size": 2, "page-size": 1}
    assert "base" not in to_toml(config)


def test_faults_of_a_base_are_told_under_its_name(toml, tmp_path):
    (tmp_path / "below.toml").write_text("[train]\nleaning_rate = 1e-4\n")
    with pytest.raises(ConfigError, match=r"below\.toml.*leaning_rate"):
        load_config([toml('base = "below.toml"')])
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read"):
        load_config([toml('base = "nowhere.toml"')])


def test_a_file_cannot_be_its_own_base(toml, tmp_path):
    (tmp_path / "below.toml").write_text('base = "run.toml"')
    with pytest.raises(ConfigError, match=r"below\.toml: base is 'run\.toml', which has this file"):
        load_config([toml('base = "below.toml"')])
    with pytest.raises(ConfigError, match="base is 3; it must be the name of a TOML file"):
        load_config([toml("base = 3")])


def test_pass_through_tables_come_from_file_and_flags(toml):
    path = toml('[transformer]\nnum_layers = 2\nmoe_token_dispatcher_type = "alltoall"\n')
    config = load_config(
        [path, "--transformer.num-layers", "4", "--optimizer.adam_eps=1e-9", "--ddp.overlap_grad_reduce", "true"]
    )
    assert config.transformer == {"num_layers": 4, "moe_token_dispatcher_type": "alltoall"}
    assert config.optimizer == {"adam_eps": 1e-9}
    assert config.ddp == {"overlap_grad_reduce": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trian]\nlr = 1.0\n", r"no section \[trian\]; the nearest is \[train\]"),
        ("[train]\nlearning = 1.0\nlrr = 2.0\n", r"(?s)train\.learning.*no setting train\.lrr; the nearest is lr"),
        ("[model]\nlr = 1.0\n", r"no setting model\.lr; it stands in \[train\]"),
        ("lr = 1.0\n", r"lr stands outside its section; put it under `\[train\]`"),
        ("train = 3\n", r"train is 3; it must be a section"),
        ('[train]\nlr = "1e-6"\n', r"train\.lr is '1e-6', a str; it must be a float"),
        ("[train]\nseed = 1.5\n", r"train\.seed is 1\.5, a float; it must be a int"),
        ("[train]\nseed = true\n", r"train\.seed is True, a bool"),
        ("[parallel]\nsequence_parallel = 1\n", r"sequence_parallel is 1, a int; it must be a bool"),
        ('[task]\ntask = "pretrain_one"\n', r"task\.task is 'pretrain_one'; it must be one of 'pretrain_zero'"),
        ("[train\n", r"run\.toml is not TOML"),
    ],
)
def test_a_fault_in_the_file_is_named_with_the_way_out(toml, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config([toml(text)])


def test_every_fault_of_a_file_is_named_at_once(toml):
    with pytest.raises(ConfigError) as error:
        load_config([toml("[train]\nlrr = 1.0\nseed = 'x'\n[nope]\n")])
    assert len(str(error.value).splitlines()) == 3
    assert all(line.split(":")[0].endswith("run.toml") for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lrr", "3"], r"no flag --lrr; the nearest is --lr\."),
        (["--train_iter=3"], r"no flag --train_iter; the nearest is --train-iters"),
        (["--train.lr", "3"], r"flags carry no section: write --lr\."),
        (["--optimzer.lr", "3"], r"no table 'optimzer' in --optimzer\.lr; the nearest is 'optimizer'"),
        (["--lr", "abc"], r"--lr: could not convert string to float: 'abc'"),
        (["--train-iters", "3.5"], r"--train-iters: invalid literal for int\(\).*'3\.5'"),
        (["--task", "foo"], r"invalid choice 'foo' for argument '--task'.*'random_span'"),
        (["--lr"], r"Missing value for argument '--lr'"),
        (["--transformer.num_layers"], r"--transformer\.num_layers has no value"),
        (["--transformer.num_layers", "--lr", "3"], r"--transformer\.num_layers has no value"),
    ],
)
def test_a_fault_on_the_command_line_is_named_with_the_way_out(toml, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_config([toml(""), *arguments])


@pytest.mark.parametrize("argv", [[], ["--lr", "3"]])
def test_the_file_comes_first(argv):
    with pytest.raises(ConfigError, match=r"first argument must be a TOML file.*Usage"):
        load_config(argv)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read: No such file"):
        load_config(["nowhere.toml"])


def test_help_shows_the_field_docstrings_and_leaves(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").replace("|", " ").split())
    assert stop.value.code == 0
    assert "Highest learning rate." in shown and "--lr FLOAT" in shown


def test_what_to_toml_writes_reads_back_equal(toml):
    config = dataclasses.replace(
        Config(),
        train=TrainConfig(lr=1e-7, lr_decay_style="constant"),
        task=TaskConfig(template_dir='a "quoted" \\ path', update="alternate"),
        transformer={"num_layers": 3, "window_size": [4, 0], "name": "é"},
    )
    assert read_config(Path(toml(to_toml(config)))) == config


@given(lr=st.floats(allow_nan=False), seed=st.integers(-(2**63), 2**63 - 1), path=st.text())
def test_any_number_and_any_text_survive_toml(tmp_path_factory, lr, seed, path):
    config = dataclasses.replace(Config(), train=TrainConfig(lr=lr, seed=seed), task=TaskConfig(template_dir=path))
    if any("\ud800" <= character <= "\udfff" for character in path):
        return  # lone surrogates are no text: UTF-8 has no bytes for them
    file = tmp_path_factory.mktemp("toml") / "run.toml"
    file.write_text(to_toml(config), encoding="utf-8", newline="")
    assert read_config(file) == config


def test_each_field_has_one_section_and_a_help_text():
    names = [field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names))
    source = (Path(__file__).parents[2] / "megatron_pz" / "config" / "schema.py").read_text(encoding="utf-8")
    assert [name for name in names if f"    {name}: " not in source] == []
    for name in names:
        after = source.split(f"\n    {name}: ", 1)[1].split("\n", 2)[1]
        assert after.startswith('    """'), f"{name} has no help"


def test_the_flags_are_these_and_no_others():
    # A flag is a promise to users: adding, renaming or removing one changes this list and the CHANGELOG.
    assert flags() == FROZEN_FLAGS.split()


FROZEN_FLAGS = """
--hf-model --tokenizer --init --params-dtype --fp8 --fp8-param-gather --make-vocab-size-divisible-by
--tensor-model-parallel-size --pipeline-model-parallel-size --virtual-pipeline-model-parallel-size
--expert-model-parallel-size --expert-tensor-parallel-size --context-parallel-size --sequence-parallel
--use-distributed-optimizer --data-path --held-out-path --min-paragraph-tokens --max-paragraph-tokens --skip-bad-lines
--task --warm-up-task --warm-up-task-steps --paragraphs-per-step --n-masks-per-paragraph --n-predictions-per-mask
--mask-validity --max-occurrences --max-mask-fraction --match --update --template-dir --prompt-style --max-prompt-tokens
--generator-weight --predictor-weight --advantage-eps --answer-weight --prompt-weight --span-p --span-max-words
--entropy-share --verifier --verifier-rule --verifier-urls --verifier-name --verifier-api-key-file --verifier-tokenizer
--verifier-template --verifier-max-tokens --verifier-requests --verifier-tries --verifier-pause-s --verifier-timeout-s
--length-penalty --length-penalty-cap --no-answer-reward --engine --max-response-tokens --temperature --top-p
--max-running-requests --async-steps --stragglers --over-sampling --server-urls --router-url --api-key-file
--num-servers --gpus-per-server --server-python --server-host --server-port --server-start-timeout-s --request-timeout-s
--weight-transport --rollout-precision --weight-bucket-mib --pause-mode --colocate --verify-weights --train-iters --seed --lr --min-lr
--lr-decay-style --lr-warmup-iters --lr-decay-iters --weight-decay --adam-beta1 --adam-beta2 --clip-grad --eps-clip
--eps-clip-high --dual-clip --loss-aggregation --kl-coef --updates-per-batch --importance-sampling --importance-cap
--routing-replay --recompute-old-log-probs --max-tokens-per-micro-batch --log-prob-chunk-tokens --log-prob-kernel
--eval-interval --num-fixed-masks --n-samples-per-fixed-mask --eval-temperature --fixed-mask-seed --probe-shuffled --run-dir
--load --save-interval --keep --async-save --export-hf --tensorboard --wandb-project --show-rollouts --write-page
"""
