"""Rounds are handed out in order, and only as many are under way as may be (train/play.py)."""

from dataclasses import dataclass, field

from megatron_pz.corpus.cursor import Cursor
from megatron_pz.train.play import Corpus, Round, Rounds
from megatron_pz.train.state import RunState
from megatron_pz.types import Paragraph

PER_STEP, LAST = 2, 5


@dataclass
class Recorder:
    """A player that writes down what it is told."""

    log: list[str] = field(default_factory=list)
    drawn: dict[int, list[str]] = field(default_factory=dict)

    def begin(self, step, paragraphs, version):
        assert version <= step - 1
        self.log.append(f"begin {step}")
        self.drawn[step] = [paragraph.id for paragraph in paragraphs]
        return Begun(self, step)

    def resume(self, left):
        self.left = [(place, paragraph.id) for place, paragraph in left]


@dataclass
class Begun:
    player: Recorder
    step: int

    def finish(self):
        self.player.log.append(f"finish {self.step}")
        return Round((), ())


def played(ahead, start=0, left=()):
    recorder = Recorder()
    corpus = Corpus([Paragraph(str(index), "") for index in range(7)], Cursor(7, seed=3))
    state = RunState(3, step=start, position=start * PER_STEP, left=left)
    rounds = Rounds(corpus, recorder, lambda step: PER_STEP, ahead, LAST, state)
    while state.step < LAST:
        assert rounds.next(state) is not None
        recorder.log.append(f"learn {state.step + 1}")
        state = state.advance(PER_STEP, updated=True)
    return recorder


def test_none_ahead_plays_and_learns_in_turns():
    assert played(0).log == [f"{what} {step}" for step in range(1, LAST + 1) for what in ("begin", "finish", "learn")]


def test_one_ahead_begins_the_next_before_it_learns_and_none_after_the_last():
    expected = (
        "begin 1 finish 1 begin 2 learn 1 finish 2 begin 3 learn 2 finish 3 begin 4 learn 3 finish 4 begin 5 learn 4"
    )
    assert " ".join(played(1).log) == expected + " finish 5 learn 5"


def test_never_more_than_ahead_are_begun_and_not_learned_from():
    for ahead in (0, 1, 2, 9):
        under_way, most = set(), 0
        for line in played(ahead).log:
            what, step = line.split()
            (under_way.add if what == "begin" else under_way.discard if what == "finish" else int)(step)
            if what == "learn":
                most = max(most, len(under_way))
        assert most == min(ahead, LAST - 1)


def test_each_round_has_the_paragraphs_it_has_without_overlap_and_after_a_resume():
    alone = played(0).drawn
    assert played(2).drawn == alone
    assert played(1, start=2).drawn == {step: alone[step] for step in (3, 4, 5)}


def test_what_a_checkpoint_left_over_is_found_again_in_the_corpus():
    alone = played(0).drawn
    assert played(0, start=3, left=((2, 1), (3, 0))).left == [((2, 1), alone[2][1]), ((3, 0), alone[3][0])]
