"""The one exception that is written for the person at the graph."""


class LongCatError(ValueError):
    """A mistake the user can mend; its text says what was expected, what was found and what to do.

    ComfyUI shows the text of an exception as it is, so the text carries both languages.
    """

    def __init__(self, en: str, zh: str) -> None:
        super().__init__(f"{en}\n{zh}")
        self.en = en
        self.zh = zh
