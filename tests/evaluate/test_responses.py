"""Responses are asked for once, kept at once, and never taken for another's."""

import asyncio
from dataclasses import replace

import pytest
from builders import ByteTokenizer, TableEngine

from megatron_pz.errors import EngineError
from megatron_pz.evaluate.responses import Ask, Kept, Response, answer_all, engine_answer

ASKS = [Ask(f"prompt {i}", 8, 0.0, 1.0, 0) for i in range(6)]


def run(path, asks, answer, model="m", **more):
    kept = Kept(path)
    try:
        return asyncio.run(answer_all(asks, model, answer, kept, **more))
    finally:
        kept.close()


class Echo:
    def __init__(self, breaks_at=None):
        self.asked, self.breaks_at = [], breaks_at

    async def __call__(self, ask):
        if self.breaks_at is not None and len(self.asked) >= self.breaks_at:
            raise EngineError("gone")
        self.asked.append(ask)
        return Response(ask.prompt.upper(), False, 3)


def test_an_evaluation_that_broke_off_goes_on_and_asks_nothing_twice(tmp_path):
    path, first, second = tmp_path / "r.jsonl", Echo(breaks_at=4), Echo()
    with pytest.raises(EngineError, match="gone"):
        run(path, ASKS, first, at_once=1)
    with path.open("ab") as file:
        file.write(b'{"name": "cut off by a ki')
    landed = []
    told = run(path, ASKS, second, landed=landed.append)
    assert [response.text for response in told] == [f"PROMPT {i}" for i in range(6)]
    assert len(first.asked) == 4 and len(second.asked) == 2 and sum(landed) == 6
    third = Echo()
    assert run(path, ASKS, third) == told and third.asked == []


@pytest.mark.parametrize(
    "other", [{"prompt": "x"}, {"max_new_tokens": 9}, {"temperature": 1.0}, {"top_p": 0.5}, {"seed": 1}]
)
def test_another_question_or_sampling_is_asked_anew(tmp_path, other):
    run(tmp_path / "r.jsonl", ASKS[:1], Echo())
    again = Echo()
    run(tmp_path / "r.jsonl", [replace(ASKS[0], **other)], again)
    assert len(again.asked) == 1


def test_another_model_is_asked_anew(tmp_path):
    run(tmp_path / "r.jsonl", ASKS, Echo())
    again = Echo()
    run(tmp_path / "r.jsonl", ASKS, again, model="n")
    assert len(again.asked) == 6


def test_equal_asks_are_one(tmp_path):
    echo = Echo()
    assert len(run(tmp_path / "r.jsonl", ASKS[:1] * 3, echo)) == 3 and len(echo.asked) == 1


def test_an_engine_is_asked_in_the_frame_and_within_its_context():
    engine, tokenizer = TableEngine(lambda prompt, params: "seven"), ByteTokenizer()
    chat, plain = (engine_answer(engine, tokenizer, style, longest=40) for style in ("chat", "plain"))
    assert asyncio.run(chat(replace(ASKS[0], max_new_tokens=9))) == Response("seven", False, 6)
    assert asyncio.run(plain(replace(ASKS[0], max_new_tokens=99))) == Response("seven", False, 6)
    assert [(prompt, params.max_new_tokens) for prompt, params in engine.requests] == [
        ("<user>prompt 0<assistant>", 9),
        ("prompt 0", 32),
    ]
    assert asyncio.run(plain(replace(ASKS[0], prompt="x" * 40))) == Response("", True, 0)
