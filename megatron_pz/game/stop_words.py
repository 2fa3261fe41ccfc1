"""English function words: a mask made of nothing else is easy to guess and teaches little."""

STOP_WORDS = frozenset(
    """
    a an the this that these those such same other another each every either neither both all any some no none few
    many much more most several own
    i me my mine we us our ours you your yours he him his she her hers it its they them their theirs who whom whose
    which what one ones itself himself herself themselves
    and or but nor so yet if then than as because while although though since until unless whether where when why how
    of in on at by for from to into onto out over under with without within about after before between among against
    during through across around along near off up down per via upon toward towards
    be am is are was were been being have has had having do does did done will would shall should can could may might
    must not also only very too just even still often usually there here now again both
    """.split()
)


def is_stop_words(text: str) -> bool:
    """True where `text` has words and each is a function word.

    >>> is_stop_words("of the"), is_stop_words("of Paris"), is_stop_words("...")
    (True, False, False)
    """
    found = [word.strip(".,;:!?()[]\"'’“”").casefold() for word in text.split()]
    found = [word for word in found if word]
    return bool(found) and all(word in STOP_WORDS for word in found)
