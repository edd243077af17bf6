"""What Python's garbage collector need not look at again and again."""

import gc


def look_past_what_is_there() -> None:
    """Have the collector look at what is made from now on alone. For a process that has started, and will serve.

    The garbage of old is looked for when what is new is a quarter of what was there before. Beside a loaded model's
    objects that is after hundreds of turns, whose garbage waits meanwhile; and then every object is looked at.
    """
    gc.collect()
    gc.freeze()
