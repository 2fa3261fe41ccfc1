"""Rules that settings keep (config/rules.py). Each case names the field at fault and a number of the message."""

import dataclasses
from pathlib import Path

import pytest
from example_runs import RANKS

from megatron_pz.config.load import read_config
from megatron_pz.config.rules import NOT_NEGATIVE, POSITIVE, validate
from megatron_pz.config.schema import Config
from megatron_pz.config.tables import SECTIONS, section_of
from megatron_pz.errors import ConfigError, LayoutError

EXAMPLES = Path(__file__).parents[2] / "examples"


def config(**fields):
    """A valid configuration with `fields` replaced, whichever section they stand in."""
    result = Config()
    for name, value in ({"hf_model": "m", "data_path": "d"} | fields).items():
        section = section_of(name)
        if section is None:
            result = dataclasses.replace(result, **{name: value})
        else:
            replaced = dataclasses.replace(getattr(result, section), **{name: value})
            result = dataclasses.replace(result, **{section: replaced})
    return result


def test_the_defaults_with_a_model_and_a_corpus_are_valid():
    validate(config(), world_size=1)
    validate(config(), world_size=8)


def test_where_nobody_trains_the_layout_is_not_asked():
    sizes = {"tensor_model_parallel_size": 8, "engine": "sglang"}
    servers = {"colocate": True, "num_servers": 4, "gpus_per_server": 2}
    validate(config(**sizes, **servers), world_size=None)
    with pytest.raises(LayoutError, match="8 GPUs, and the trainer has 4"):
        validate(config(**servers, engine="sglang"), world_size=4)


def test_a_file_serves_its_servers_and_the_trainer_that_is_given_their_addresses():
    validate(config(engine="sglang", server_urls="http://a:1", server={"mem-fraction-static": 0.7}), world_size=1)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_every_example_is_valid(path):
    validate(read_config(path), world_size=RANKS.get(path.stem, 1))


@pytest.mark.parametrize(
    ("fields", "world_size", "message"),
    [
        ({"tensor_model_parallel_size": 2}, 3, r"3 ranks.*2 x 1 x 1 = 2"),
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "engine": "sglang"},
            6,
            r"6 ranks.*2 x 2 x 1 = 4",
        ),
        ({"expert_model_parallel_size": 4}, 2, r"over the experts.*1 x 4 x 1 = 4"),
        ({"sequence_parallel": True}, 2, r"sequence_parallel is true while.*is 1"),
        ({"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}, 2, r"Set it to true"),
        ({"context_parallel_size": 2}, 3, r"3 ranks.*1 x 1 x 2 = 2"),
        ({"virtual_pipeline_model_parallel_size": 2}, 2, r"virtual_pipeline_model_parallel_size is 2 while.*is 1"),
        (
            {
                "pipeline_model_parallel_size": 4,
                "engine": "sglang",
                "transformer": {"microbatch_group_size_per_vp_stage": 2},
            },
            4,
            r"microbatch_group_size_per_vp_stage is 2, below.* 4",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_a_layout_error(fields, world_size, message):
    with pytest.raises(LayoutError, match=message):
        validate(config(**fields), world_size)


@pytest.mark.parametrize(
    ("fields", "world_size"),
    [
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "engine": "sglang"}, 8),
        ({"expert_model_parallel_size": 2}, 4),
        ({"context_parallel_size": 2, "tensor_model_parallel_size": 2}, 8),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "engine": "sglang"}, 2),
        ({"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}, 2),
    ],
)
def test_a_layout_that_fits_passes(fields, world_size):
    validate(config(**fields), world_size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hf_model": ""}, r"model\.hf_model is empty"),
        ({"data_path": ""}, r"corpus\.data_path is empty"),
        ({"run_dir": ""}, r"checkpoint\.run_dir is empty"),
        ({"lr": float("nan")}, r"train\.lr is nan; it must be a finite number"),
        ({"lr": 1e-8}, r"min_lr is 5e-08, above train\.lr 1e-08"),
        ({"lr_warmup_iters": 10, "train_iters": 10}, r"lr_warmup_iters is 10 while the decay ends after 10"),
        ({"adam_beta2": 1.0}, r"adam_beta2 is 1\.0"),
        ({"eps_clip": 0.0}, r"eps_clip is 0\.0; it must be between 0 and 1"),
        ({"eps_clip": 1.0}, r"eps_clip is 1\.0"),
        ({"eps_clip_high": 0.0}, r"eps_clip_high is 0\.0"),
        ({"dual_clip": 0.9}, r"dual_clip is 0\.9; it must be above 1"),
        ({"n_predictions_per_mask": 1}, r"n_predictions_per_mask is 1; it must be 2 or more"),
        ({"n_masks_per_paragraph": 1}, r"n_masks_per_paragraph is 1; it must be 2 or more"),
        ({"temperature": 0.0}, r"temperature is 0\.0; it must be above 0 in training"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"pipeline_model_parallel_size": 2}, r"pipeline_model_parallel_size is 2 while engine\.engine is 'embedded'"),
        ({"async_steps": 1}, r"engine\.async_steps is 1 while engine\.engine is 'embedded'"),
        (
            {"stragglers": "cut", "over_sampling": 0.5},
            r"engine\.stragglers is 'cut' while engine\.engine is 'embedded'",
        ),
        ({"engine": "sglang", "stragglers": "cut"}, r"over_sampling is 0\.0 while engine\.stragglers is 'cut'"),
        ({"routing_replay": True}, r"routing_replay is true while engine\.engine is 'embedded'"),
        (
            {"engine": "sglang", "colocate": True, "num_servers": 3, "gpus_per_server": 2},
            r"num_servers 3 x sglang\.gpus_per_server 2 = 6 GPUs, and the trainer has 1",
        ),
        ({"engine": "sglang", "rollout_precision": "fp8_blockwise"}, r"gpus_per_server 0: SGLang computes FP8 on GPUs"),
        ({"engine": "sglang", "colocate": True, "async_steps": 1}, r"colocate is true with engine\.async_steps 1"),
        ({"importance_cap": 1.0}, r"importance_cap is 1\.0; it must be above 1"),
        ({"router_url": "http://r:1"}, r"router_url is set and sglang\.server_urls is empty"),
        ({"max_mask_fraction": 0.0}, r"max_mask_fraction is 0\.0"),
        ({"span_p": 0.0}, r"span_p is 0\.0"),
        ({"max_prompt_tokens": 1280}, r"max_paragraph_tokens is 1280 and task\.max_prompt_tokens 1280"),
        ({"min_paragraph_tokens": 2000}, r"min_paragraph_tokens is 2000, above max_paragraph_tokens 1280"),
        ({"task": "random_span", "update": "alternate"}, r"'alternate' while task\.task is 'random_span'"),
        ({"generator_weight": 0.0, "predictor_weight": 0.0}, r"both 0: nothing would be trained"),
        ({"task": "random_span", "predictor_weight": 0.0}, r"predictor_weight is 0 under random_span"),
        ({"task": "random_ntp", "predictor_weight": 0.0}, r"predictor_weight is 0 under random_ntp"),
        ({"warm_up_task": "random_span"}, r"warm_up_task is 'random_span' and task\.warm_up_task_steps 0"),
        ({"warm_up_task_steps": 5}, r"warm_up_task is '' and task\.warm_up_task_steps 5"),
        (
            {"warm_up_task": "random_span", "warm_up_task_steps": 5, "task": "sft"},
            r"'random_span' before task\.task 'sft', which is no game",
        ),
        (
            {"warm_up_task": "random_span", "warm_up_task_steps": 5, "update": "alternate"},
            r"'alternate' with a task\.warm_up_task",
        ),
        ({"task": "entropy_ntp", "entropy_share": 0.0}, r"entropy_share is 0\.0; it must be above 0"),
        (
            {"task": "entropy_ntp", "engine": "sglang", "stragglers": "continue", "over_sampling": 0.5},
            r"'continue' under entropy_ntp",
        ),
        ({"task": "sft", "answer_weight": 0.0}, r"answer_weight and task\.prompt_weight are both 0"),
        ({"optimizer": {"lr": 1e-3}}, r"optimizer\.lr has a place of its own, train\.lr.*--lr\)"),
    ],
)
def test_a_fault_is_named_with_its_value(fields, message):
    with pytest.raises(ConfigError, match=message):
        validate(config(**fields), world_size=1)


@pytest.mark.parametrize(("section", "name"), [(s, n) for s, names in POSITIVE.items() for n in names])
def test_a_count_of_zero_is_refused(section, name):
    with pytest.raises(ConfigError, match=rf"{section}\.{name} is 0; it must be 1 or more"):
        validate(config(**{name: 0}), world_size=1)


@pytest.mark.parametrize(("section", "name"), [(s, n) for s, names in NOT_NEGATIVE.items() for n in names])
def test_a_negative_value_is_refused(section, name):
    with pytest.raises(ConfigError, match=rf"{section}\.{name} is -1.*; it must be 0 or more"):
        validate(config(**{name: type(getattr(getattr(Config(), section), name))(-1)}), world_size=1)


def test_every_number_that_a_table_names_exists():
    for table in (POSITIVE, NOT_NEGATIVE):
        for section, names in table.items():
            assert set(names) <= set(SECTIONS[section].__dataclass_fields__)


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0.0, "lr_decay_style": "constant"},  # the control that learns nothing
        {"lr": 0.0, "min_lr": 0.0},
        {"task": "random_span", "n_masks_per_paragraph": 1},
        {"task": "sft", "temperature": 0.0, "n_predictions_per_mask": 1},
        {"task": "continue_pt", "max_prompt_tokens": 16},
        {"eval_temperature": 0.0},
        {"dual_clip": 10.0},
        {"transformer": {"num_layers": 2}},
    ],
)
def test_settings_that_make_sense_pass(fields):
    validate(config(**fields), world_size=1)


def test_all_faults_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        validate(
            config(
                lr=-1.0,
                min_lr=-2.0,
                eps_clip=2.0,
                keep=0,
                context_parallel_size=2,
                virtual_pipeline_model_parallel_size=2,
            ),
            world_size=3,
        )
    faults = str(error.value).splitlines()
    assert len(faults) == 6  # lr, min_lr, keep, eps_clip, the division of 3 by 2, interleaving without a pipeline
    assert not isinstance(error.value, LayoutError)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"verifier": "model"}, r"verifier\.verifier_urls is empty"),
        ({"length_penalty": 0.1}, r"leaves a right answer 0 "),
        ({"no_answer_reward": 0.1}, r"no_answer_reward is 0\.1"),
        ({"verifier_timeout_s": 0.0}, r"verifier_timeout_s is 0\.0"),
        ({"eval_interval": 5}, r"eval_interval is 5 under task 'rlvr'"),
        ({"predictor_weight": 0.0}, r"predictor_weight is 0 under rlvr"),
    ],
)
def test_verified_rewards_have_their_rules(fields, told):
    rlvr = {"task": "rlvr", "eval_interval": 0}
    validate(config(**rlvr), 1)
    with pytest.raises(ConfigError, match=told):
        validate(config(**rlvr | fields), 1)
