"""Who says whether an answer to a question is right: a rule, or a language model on servers of its own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from megatron_pz.config.schema import VerifierConfig
from megatron_pz.engine.openai_url import OpenAIServers
from megatron_pz.engine.sglang.faults import ServerBusy, ServerLost, ServerRefused
from megatron_pz.engine.sglang.specs import read_key
from megatron_pz.grade.general_verifier import load_template, says_yes, verifier_prompt
from megatron_pz.grade.judge import TIME_LIMIT_S, Judge

_TOO_LONG_OR_ODD = (400, 413, 422)
"""What a server says of one request that it will not have; anything else is about all of them."""


RULE_WORKERS = 2
"""Comparisons at one time: they share the machine with a trainer."""


class Verifier(Protocol):
    """Says whether an answer is right."""

    async def __call__(self, question: str, truth: str, answer: str) -> bool | None:
        """Whether `answer` is right; None where that could not be found out."""
        ...


class RuleVerifier:
    """Compares by Qwen's semantics or by math-verify; a comparison that takes too long is not found out."""

    def __init__(self, config: VerifierConfig) -> None:
        self.rule = config.verifier_rule
        self._judge = Judge(min(config.verifier_timeout_s, TIME_LIMIT_S), num_workers=RULE_WORKERS)
        self._threads = ThreadPoolExecutor(RULE_WORKERS)

    async def __call__(self, question: str, truth: str, answer: str) -> bool | None:
        boxed = f"\\boxed{{{answer}}}" if self.rule == "math_verify" else answer
        loop = asyncio.get_running_loop()
        verdict = await loop.run_in_executor(self._threads, self._judge, self.rule, boxed, truth)
        return None if verdict.fault in ("timeout", "crash") else verdict.right


class ModelVerifier:
    """Asks the verifier's servers, greedily; a question that they do not answer after all tries is not found out.

    Raises:
        ServerRefused: (when asked) the servers say no to everything, e.g. for a wrong key, or since they take no text.
    """

    def __init__(self, config: VerifierConfig) -> None:
        self.config, self.template = config, load_template(config.verifier_template)
        self._servers = OpenAIServers(
            [url.strip() for url in config.verifier_urls.split(",") if url.strip()],
            api="completions",
            model=config.verifier_name,
            api_key=read_key(config.verifier_api_key_file),
            tries=config.verifier_tries,
            timeout_s=config.verifier_timeout_s,
            first_pause_s=config.verifier_pause_s,
        )
        self._threads = ThreadPoolExecutor(config.verifier_requests)

    async def __call__(self, question: str, truth: str, answer: str) -> bool | None:
        prompt = verifier_prompt(self.template, question, truth, answer)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, prompt)

    def _ask(self, prompt: str) -> bool | None:
        try:
            return says_yes(self._servers.complete(prompt, self.config.verifier_max_tokens, temperature=0.0).text)
        except (ServerLost, ServerBusy):
            return None
        except ServerRefused as refused:
            if refused.status not in _TOO_LONG_OR_ODD:
                raise
            # One answer too long is that answer's fault; but servers that refuse all would leave out every rollout.
            self._servers.complete("Assistant:", 1, temperature=0.0)
            return None


def make_verifier(config: VerifierConfig) -> Verifier:
    """The verifier that the settings name.

    Raises:
        ConfigError, TemplateError: its key or its prompt cannot be read.
    """
    return RuleVerifier(config) if config.verifier == "rule" else ModelVerifier(config)
