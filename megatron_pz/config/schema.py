"""Every setting of a run, as frozen dataclasses. The text under a field is its help.

Field names are unique over all sections, so that `--lr 1e-6` needs no section on the command line; in TOML they stand
in their section (`[train] lr = 1e-6`). Names are Megatron-LM's where Megatron-LM has one, else ours.
`[transformer]`, `[optimizer]` and `[ddp]` set any field of Megatron-Core's own config classes by its name, `[server]` any flag
of SGLang's server.
Rules that tie fields together are in `config.rules`; reading and overriding is `config.load`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Game = Literal["pretrain_zero", "random_span", "random_ntp", "entropy_ntp", "format_only"]
TaskName = Literal[Game, "continue_pt", "sft", "rlvr"]


@dataclass(frozen=True)
class ModelConfig:
    hf_model: str = ""
    """Hugging Face folder (or hub name) of the policy: config.json, weights and, unless `tokenizer` is set, tokenizer."""
    tokenizer: str = ""
    """Folder, hub name or SentencePiece `.model` file; empty: the one beside the model."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`pretrained` loads the weights of `hf_model`; `random` takes only its config.json."""
    params_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights in the forward; with bfloat16 the optimizer keeps float32 masters."""
    fp8: Literal["off", "blockwise", "tensorwise", "delayed", "mxfp8"] = "off"
    """Matrix products of the layers in FP8 (CUDA, Transformer Engine, bfloat16 weights): `blockwise` is for Hopper, `mxfp8` for
    Blackwell, `tensorwise` and `delayed` scale whole tensors. `[transformer] first_last_layers_bf16 = true` spares the ends."""
    fp8_param_gather: bool = False
    """Keep the layers' weights in FP8 too, and gather them so; the optimizer has its float32 masters as before."""
    make_vocab_size_divisible_by: int = 8
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    """Ranks that share each weight matrix."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers."""
    virtual_pipeline_model_parallel_size: int = 1
    """Pieces of each pipeline rank's layers, run in turns (interleaved 1F1B); 1: the rank's layers lie in one piece."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a MoE layer."""
    expert_tensor_parallel_size: int = 0
    """Tensor-parallel size inside an expert; 0: 1 where experts are shared out over ranks, else as the dense layers'."""
    context_parallel_size: int = 1
    """Ranks that share each sequence."""
    sequence_parallel: bool = False
    """Shard norms and dropout along the sequence between tensor-parallel ranks."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""


@dataclass(frozen=True)
class CorpusConfig:
    data_path: str = ""
    """JSONL file (or folder of them) with one object a line that has a `text` field, or a store of tools/prepare_corpus.py."""
    held_out_path: str = ""
    """JSONL or store of text that is never trained on; empty: none is scored."""
    min_paragraph_tokens: int = 8
    """Paragraphs shorter than this many tokens are left out (counted)."""
    max_paragraph_tokens: int = 1280
    """Paragraphs longer than this many tokens are left out (counted)."""
    skip_bad_lines: bool = False
    """Leave out malformed lines (counted) instead of stopping at the first."""


@dataclass(frozen=True)
class TaskConfig:
    task: TaskName = "pretrain_zero"
    """What is played: PretrainZero, its baselines with random spans, random next tokens or next tokens of high entropy, the control
    that pays any answer that can be read, next-token training, supervised training on both formats, or questions whose answers a
    verifier pays."""
    warm_up_task: Literal["", Game] = ""
    """Game of the first `warm_up_task_steps` steps, before `task`; empty: none."""
    warm_up_task_steps: int = 0
    """Steps of `warm_up_task`; the paper gives SmolLM3 100 of `random_span`."""
    paragraphs_per_step: int = 32
    """Paragraphs drawn each step."""
    n_masks_per_paragraph: int = 8
    """Mask rollouts a paragraph (one generator group). `random_span`: random masks a paragraph; `*_ntp`: tokens asked about."""
    n_predictions_per_mask: int = 8
    """Prediction rollouts a mask (one predictor group). `rlvr`: answers a question."""
    mask_validity: Literal["default", "one_mask", "whole_words"] = "default"
    """`default`: 1 to 7 occurrences, all hidden; `one_mask`: one random occurrence hidden; `whole_words`: default, whole words only."""
    max_occurrences: int = 7
    """A span that occurs more often than this in its paragraph cannot be hidden."""
    max_mask_fraction: float = 0.5
    """A span longer than this share of the paragraph's characters cannot be hidden."""
    match: Literal["strict", "casefold"] = "strict"
    """How a prediction is compared with the hidden text after normalisation."""
    update: Literal["joint", "alternate"] = "joint"
    """`joint`: both roles in each update; `alternate`: generator groups on odd steps, predictor groups on even steps."""
    template_dir: str = ""
    """Folder with `mask.txt`, which says {paragraph} where the text is to stand, and `prediction.txt`, which says {masked_paragraph};
    empty: the package's own for `prompt_style`."""
    prompt_style: Literal["plain", "chat"] = "chat"
    """`chat`: the template is one user turn of the tokenizer's chat template; `plain`: the template is the whole prompt."""
    max_prompt_tokens: int = 1536
    """Longest prompt of either role."""
    generator_weight: float = 1.0
    """Loss weight of mask-generation tokens."""
    predictor_weight: float = 1.0
    """Loss weight of mask-prediction tokens."""
    advantage_eps: float = 1e-6
    """Added to the standard deviation of a group's rewards."""
    answer_weight: float = 1.0
    """`sft`: loss weight of the response's tokens."""
    prompt_weight: float = 0.0
    """`sft`: loss weight of the prompt's tokens (the language-model part)."""
    span_p: float = 0.2
    """`random_span` and fixed masks: parameter of the geometric law of span length in words."""
    span_max_words: int = 10
    """`random_span` and fixed masks: longest span in words."""
    entropy_share: float = 0.2
    """`entropy_ntp`: share of a paragraph's tokens, those of the highest entropy, that questions are drawn from."""

    def at(self, step: int) -> str:
        """Name of the task of `step`, from 1.

        >>> recipe = TaskConfig(warm_up_task="random_span", warm_up_task_steps=100)
        >>> recipe.at(100), recipe.at(101)
        ('random_span', 'pretrain_zero')
        """
        return self.warm_up_task if self.warm_up_task and step <= self.warm_up_task_steps else self.task


@dataclass(frozen=True)
class VerifierConfig:
    verifier: Literal["rule", "model"] = "rule"
    """`rlvr`: who says whether an answer is right: a rule (`verifier_rule`), or a language model at `verifier_urls`."""
    verifier_rule: Literal["qwen", "math_verify"] = "math_verify"
    """Rule of `verifier = "rule"`: Qwen2.5-Math's grader semantics, or the library math-verify."""
    verifier_urls: str = ""
    """Servers of the verifier's model, separated by commas; any that speaks OpenAI's completions, SGLang for one."""
    verifier_name: str = ""
    """The model's name at those servers; empty: the first that they name."""
    verifier_api_key_file: str = ""
    """File with their key."""
    verifier_tokenizer: str = ""
    """Folder or hub name of the tokenizer in which the length penalty counts (the verifier's); empty: the policy's."""
    verifier_template: str = ""
    """File with the verifier's prompt, with {question}, {truth} and {answer}; empty: the package's own."""
    verifier_max_tokens: int = 2048
    """Longest output of the verifier."""
    verifier_requests: int = 64
    """Answers that are judged by the model at one time."""
    verifier_tries: int = 5
    """Times that the verifier's servers are asked; after that the rollout is unverified and left out."""
    verifier_pause_s: float = 1.0
    """Pause before the second try; it doubles."""
    verifier_timeout_s: float = 120.0
    """Seconds for one judgement; a rule has at most 5."""
    length_penalty: float = 0.05
    """Taken from a right answer's reward for each token that it is longer or shorter than the reference; 0: none."""
    length_penalty_cap: int = 10
    """Most tokens that are counted."""
    no_answer_reward: float = -0.5
    """Reward of a response without a boxed answer."""


@dataclass(frozen=True)
class EngineConfig:
    engine: Literal["embedded", "sglang"] = "embedded"
    """What generates: the trainer's own weights and KV cache, or SGLang servers."""
    max_response_tokens: int = 4096
    """Longest response of either role."""
    temperature: float = 1.0
    """Sampling temperature of both roles; log-probs of the trainer are taken under it too."""
    top_p: float = 1.0
    """Nucleus sampling; 1.0 is off."""
    max_running_requests: int = 256
    """`embedded`: sequences decoded together; `sglang`: requests under way, over all servers."""
    async_steps: int = 0
    """`sglang`: rounds that may be played ahead of the update that is under way; 0: play and train take turns."""
    stragglers: Literal["wait", "cut", "continue"] = "wait"
    """`sglang`: a round ends when all its paragraphs are done, or when `paragraphs_per_step` of more that were begun are:
    the others are given up (`cut`), or go on in the next round (`continue`), under its weights."""
    over_sampling: float = 0.0
    """Share of paragraphs begun beyond `paragraphs_per_step` where stragglers are not waited for."""


@dataclass(frozen=True)
class SGLangConfig:
    server_urls: str = ""
    """Servers to attach to, separated by commas, e.g. http://node1:30000,http://node2:30000; empty: the run starts its own."""
    router_url: str = ""
    """sglang-router in front of `server_urls`: requests go there, control calls to each server."""
    api_key_file: str = ""
    """File with the key of the servers to attach to; the run's own servers get a key made for the run."""
    num_servers: int = 1
    """Servers that the run starts."""
    gpus_per_server: int = 0
    """GPUs of each server that the run starts (its tensor-parallel size); 0: the CPU."""
    server_python: str = ""
    """Python interpreter of an environment that has `sglang`; empty: the one that runs this program."""
    server_host: str = "127.0.0.1"
    """Address that the run's own servers listen on."""
    server_port: int = 0
    """First port of the run's own servers; 0: free ones are found."""
    server_start_timeout_s: float = 900.0
    """Seconds until a server must be ready."""
    request_timeout_s: float = 600.0
    """Seconds after which a request without an answer has its server examined."""
    weight_transport: Literal["disk", "tensor", "distributed"] = "tensor"
    """How weights reach the servers: files, tensors in requests, or a collective that servers and trainer share."""
    rollout_precision: Literal["trained", "fp8_blockwise"] = "trained"
    """Weights that servers sample with: the trainer's, or FP8 by blocks of 128 made of them at each sync (embedding, head, norms
    and routers stay). Servers to attach to must have been started with such a folder."""
    weight_bucket_mib: int = 512
    """Weights under way at one time, beside the model's own memory."""
    pause_mode: Literal["retract", "in_place", "abort"] = "retract"
    """What happens to requests under way while weights arrive."""
    colocate: bool = False
    """The run's own servers use the trainer's GPUs: they release their memory while it trains, and it leaves gradients and
    optimizer state in host memory while they generate."""
    verify_weights: bool = False
    """After each sync compare a checksum of every tensor over the servers, and probe one prompt greedily."""


@dataclass(frozen=True)
class TrainConfig:
    train_iters: int = 2000
    """Optimizer updates in all."""
    seed: int = 1234
    """Of data order, sampling and initialisation."""
    lr: float = 5e-7
    """Highest learning rate."""
    min_lr: float = 5e-8
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay after the warm-up."""
    lr_warmup_iters: int = 0
    """Updates over which the learning rate rises from 0."""
    lr_decay_iters: int = 0
    """Updates at whose end `min_lr` is reached; 0: `train_iters`."""
    weight_decay: float = 0.01
    """Decoupled weight decay (not on norms and biases)."""
    adam_beta1: float = 0.9
    """First moment's decay."""
    adam_beta2: float = 0.999
    """Second moment's decay."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 is off."""
    eps_clip: float = 0.2
    """Lower clip of the probability ratio: 1 - eps_clip."""
    eps_clip_high: float = 0.28
    """Upper clip of the probability ratio: 1 + eps_clip_high (clip-higher)."""
    dual_clip: float = 0.0
    """Bound of the ratio for negative advantages (c > 1, e.g. 10); 0 is off."""
    loss_aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over all trained tokens of the step, or over sequences of their token means."""
    kl_coef: float = 0.0
    """Weight of the KL to the initial policy (k3 estimator); 0: no reference model."""
    updates_per_batch: int = 1
    """Optimizer updates that one round of play is split into."""
    importance_sampling: Literal["off", "truncated", "masked"] = "off"
    """Correction for engine and trainer that differ: weigh a token by its probability ratio trainer to engine, cut at
    `importance_cap` (`truncated`), or leave out tokens whose ratio is over the cap or under its reciprocal (`masked`)."""
    importance_cap: float = 2.0
    """Largest weight of a token under `importance_sampling`."""
    routing_replay: bool = False
    """MoE: train each token on the experts that the server chose for it."""
    recompute_old_log_probs: bool = False
    """Take the ratio's denominator from the trainer before the update instead of from the engine (always so with several updates)."""
    max_tokens_per_micro_batch: int = 8192
    """Token budget of a packed micro-batch; a longer single sample still goes alone."""
    log_prob_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time, with `log_prob_kernel = "chunked"`."""
    log_prob_kernel: Literal["auto", "chunked", "fused"] = "chunked"
    """Log-probs and entropies by chunks of logits, or by a Triton kernel that writes none (not yet run on a GPU); `auto`: fused on CUDA
    where Triton is."""


@dataclass(frozen=True)
class EvaluateConfig:
    eval_interval: int = 50
    """Score the fixed masks every so many steps, and before the first and after the last; 0: never."""
    num_fixed_masks: int = 128
    """Questions in each fixed set."""
    n_samples_per_fixed_mask: int = 1
    """Sampled answers a question."""
    eval_temperature: float = 1.0
    """Temperature of these answers; 0 is greedy."""
    fixed_mask_seed: int = 7
    """Chooses the questions; the same for every run that is to be compared."""
    probe_shuffled: bool = False
    """Also ask the fixed masks with the words of their texts shuffled: who still answers knows the texts by heart."""


@dataclass(frozen=True)
class CheckpointConfig:
    run_dir: str = "runs/run"
    """Where the run writes everything; a run found there is continued."""
    load: str = ""
    """Checkpoint whose weights the run begins with instead of those of `hf_model`: a `step_N` folder of any run and layout, or
    a converted one. The optimizer begins anew. A run that has checkpoints of its own goes on from them."""
    save_interval: int = 100
    """Save every so many steps, and at the end; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    async_save: bool = False
    """Copy the state to host memory and go on training while the files are written; the checkpoint appears when they are whole."""
    export_hf: bool = True
    """Write a Hugging Face folder (`hf/` in the run directory) at the end."""


@dataclass(frozen=True)
class ReportConfig:
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb_project: str = ""
    """Weights & Biases project; empty: not used."""
    show_rollouts: int = 0
    """Paragraphs of each evaluation step that the console shows with mask, predictions and rewards."""
    write_page: bool = True
    """Write `report.html` at the end."""


@dataclass(frozen=True)
class Config:
    """All settings of a run, as `config.toml` of its directory has them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    transformer: dict[str, Any] = field(default_factory=dict)
    """Fields of megatron.core.transformer.TransformerConfig, by name."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Fields of megatron.core.optimizer.OptimizerConfig, by name."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """Fields of megatron.core.distributed.DistributedDataParallelConfig, by name."""
    server: dict[str, Any] = field(default_factory=dict)
    """Flags of `sglang.launch_server` for the servers that the run starts, by name."""
