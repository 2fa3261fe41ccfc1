"""Function words of English, Korean and Chinese: a mask made of nothing else is easy to guess and teaches little."""

import re

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
    그리고 그러나 하지만 그래서 또는 또한 및 등 이 그 저 것 수 있다 없다 이다 있는 하는 위해 대한 의해 따라
    """.split()
)


_CHINESE = re.compile(
    "(?:的|了|是|在|和|與|与|及|或|也|都|就|而|但|但是|因為|因为|所以|如果|這|这|那|這個|这个|其|之|以|於|于|由|為|为|有|被|把|對|对|從|从|到|一個|一个)+"
)


def is_stop_words(text: str) -> bool:
    """True where `text` has words and each is a function word.

    >>> is_stop_words("of the"), is_stop_words("of Paris"), is_stop_words("...")
    (True, False, False)
    """
    found = [word.strip(".,;:!?()[]\"'’“”、。，；：？！（）「」《》").casefold() for word in text.split()]
    found = [word for word in found if word]
    return bool(found) and all(word in STOP_WORDS or _CHINESE.fullmatch(word) is not None for word in found)
