"""A row that is set aside."""


class Rejection(Exception):
    """Why one row is set aside: a short reason to count by, and what was found in this row.

    Raised and caught within a stage, which writes it down; it never ends a run.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail
