"""The one exception that a user is meant to read."""


class Problem(Exception):
    """What is wrong with the input, in sentences that say where, what was found and what to do.

    Raise it with every problem that is known at that point, not only with the first one. `python -m stages` prints them
    and exits with 1; anything else that is raised is a bug in Loratory and ends in a traceback.
    """

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class Rejection(Exception):
    """Why one row is rejected: a short reason to count by, and what was found in this row.

    Raised and caught within a stage, which writes it down; it never ends a run.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail
