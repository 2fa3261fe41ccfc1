"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_pz.plan.assumptions import GIB
from megatron_pz.plan.layouts import RECOMPUTE, Machines, Plan
from megatron_pz.plan.memory import longest_row


def report(plan: Plan, machines: Machines, others: Sequence[Plan] = ()) -> str:
    """The plan, part by part.

    Args:
        others: the same layout under other budgets and recomputation.
    """
    parts = [
        _head(plan, machines),
        _memory(plan, machines),
        _recomputed(others),
        _server(plan),
        _wires(plan),
        _time(plan, machines),
    ]
    verdict = "fits" if not plan.faults else "does not fit: " + "; ".join(plan.faults)
    return "\n\n".join([part for part in parts if part] + [verdict])


def proposals(plans: Sequence[Plan], limit: int) -> str:
    """Layouts, the nearest first, and the fastest of all beside them."""
    if not plans:
        return "no layout on this many GPUs fits"
    fastest = min(plans, key=lambda plan: plan.time.total)
    rows = [_proposal(plan) for plan in plans[:limit]]
    lines = [
        "layouts that fit, the nearest first",
        *_aligned([("", "tp pp vpp ep cp", "recompute", "tokens", "GiB", "s"), *rows]),
    ]
    lines.append("the fastest of all: " + "  ".join(_proposal(fastest)).strip())
    lines.append("as flags, the first: " + flags(plans[0]))
    return "\n".join(lines)


def flags(plan: Plan) -> str:
    """Flags that change a run's layout to the plan's."""
    sizes, found = plan.config.parallel, []
    for name in ("tensor_model", "pipeline_model", "expert_model", "context"):
        found.append(f"--{name.replace('_', '-')}-parallel-size {getattr(sizes, f'{name}_parallel_size')}")
    found.append("--sequence-parallel" if sizes.sequence_parallel else "--no-sequence-parallel")
    found.append(f"--max-tokens-per-micro-batch {plan.config.train.max_tokens_per_micro_batch}")
    for name in RECOMPUTE:
        if name in plan.config.transformer:
            found.append(f"--transformer.{name} {plan.config.transformer[name]}")
    return " ".join(found)


def recomputation(plan: Plan) -> str:
    """What is recomputed, in a word or two."""
    table = plan.config.transformer
    granularity = table.get("recompute_granularity")
    if granularity == "selective":
        return "selective " + "+".join(table.get("recompute_modules") or ["core_attn"])
    if granularity == "full":
        return f"full {table.get('recompute_method', '')} {table.get('recompute_num_layers', 1)}"
    return "none"


def _layout(plan: Plan) -> str:
    sizes = plan.config.parallel
    return (
        f"{sizes.tensor_model_parallel_size:2d} {sizes.pipeline_model_parallel_size:2d} "
        f"{sizes.virtual_pipeline_model_parallel_size:3d} "
        f"{sizes.expert_model_parallel_size:2d} {sizes.context_parallel_size:2d}"
    )


def _proposal(plan: Plan) -> tuple[str, ...]:
    budget = plan.config.train.max_tokens_per_micro_batch
    return ("", _layout(plan), recomputation(plan), str(budget), f"{plan.gib:.1f}", f"{plan.time.total:.0f}")


def _head(plan: Plan, machines: Machines) -> str:
    sizes = plan.config.parallel
    model = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
    where = "on the trainer's GPUs" if plan.config.sglang.colocate else "on GPUs of their own"
    lines = [
        f"{plan.config.model.hf_model}: {machines.world_size} ranks, tensor {sizes.tensor_model_parallel_size} x context "
        f"{sizes.context_parallel_size} x pipeline {sizes.pipeline_model_parallel_size} (in "
        f"{sizes.virtual_pipeline_model_parallel_size}) x data "
        f"{machines.world_size // model}; experts {sizes.expert_model_parallel_size}",
        f"micro-batches of {longest_row(plan.config)} tokens, {plan.num_micro_batches} an update and rank; "
        f"recomputed: {recomputation(plan)}",
    ]
    if plan.server is not None:
        lines.append(f"{plan.num_servers} SGLang servers of {plan.server.num_gpus} GPU(s), {where}")
    return "\n".join(lines)


def _memory(plan: Plan, machines: Machines) -> str:
    reference = ("reference",) if any(memory.reference for memory in plan.memories) else ()
    names = ("parameters", "gradients", "optimizer", "activations", "head", *reference, "total")
    rows: list[tuple[str, ...]] = [("GiB on a GPU", "layers", "billion", *names)]
    shown: dict[tuple[str, ...], list[int]] = {}
    for stage, memory in zip(plan.stages, plan.memories, strict=True):
        values = tuple(f"{getattr(memory, name) / GIB:.2f}" for name in names)
        shown.setdefault((str(len(stage.layers)), f"{stage.num_parameters / 1e9:.3f}", *values), []).append(stage.index)
    for row, stages in shown.items():
        rows.append((f"stage {_ranges(stages)}", *row))
    assumed = machines.assumed
    lines = _aligned(rows)
    lines.append(
        f"of {assumed.gpu_memory_gib:g} GiB, {assumed.reserve_gib:g} are reserved"
        + (f", {assumed.sleeping_server_gib:g} stay with the sleeping server" if plan.config.sglang.colocate else "")
    )
    if plan.host_gib:
        lines.append(f"host memory of a node for optimizer state: {plan.host_gib:.0f} GiB")
    lines.append(plan.saves.line())
    return "\n".join(lines)


def _recomputed(plans: Sequence[Plan]) -> str:
    budgets = sorted({longest_row(plan.config) for plan in plans})
    rows: list[tuple[str, ...]] = [("GiB of activations and head by tokens", *map(str, budgets))]
    by_mode: dict[str, dict[int, str]] = {}
    for plan in plans:
        size = max(memory.activations + memory.head for memory in plan.memories) / GIB
        by_mode.setdefault(recomputation(plan), {})[longest_row(plan.config)] = f"{size:.2f}"
    rows += [(f"recomputed: {mode}", *(found[budget] for budget in budgets)) for mode, found in by_mode.items()]
    return "\n".join(_aligned(rows)) if plans else ""


def _server(plan: Plan) -> str:
    if plan.server is None:
        return ""
    server, config = plan.server, plan.config
    longest = config.task.max_prompt_tokens + config.engine.max_response_tokens
    return (
        f"server, on each of its GPUs: weights {server.weights / GIB:.1f} GiB, key-value cache {server.cache / GIB:.1f} GiB: "
        f"{server.tokens} tokens, {server.tokens // longest} sequences of {longest}"
    )


def _wires(plan: Plan) -> str:
    rows: list[tuple[str, ...]] = [("traffic of a step", "ranks", "nodes", "GB a GPU", "s")]
    for link in plan.wires:
        rows.append(
            (link.name, str(link.num_ranks), str(link.num_nodes), f"{link.num_bytes / 1e9:.1f}", f"{link.seconds:.2f}")
        )
    return "\n".join(_aligned(rows)) if plan.wires else ""


def _time(plan: Plan, machines: Machines) -> str:
    time = plan.time
    names = ("play", "compute", "bubble", "communicate", "optimizer", "move", "sync")
    parts = ", ".join(f"{name} {getattr(time, name):.1f}" for name in names if getattr(time, name))
    beside = " (play runs beside the update)" if time.overlaps else ""
    return (
        f"about {time.total:.0f} s a step{beside}: {parts}\n"
        f"assumed, not measured: {', '.join(machines.assumed.lines())}; "
        f"layers of {'Transformer Engine' if machines.is_engine else 'plain torch'}; "
        "no communication hidden behind compute"
    )


def _ranges(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
