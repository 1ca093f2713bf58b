"""Why a request is not answered."""


class Refusal(Exception):
    """A request that is refused: nothing of it is answered or charged.

    status: HTTP's. code: a word for programs. message, remedy: what is wrong and what to do, for people. wait: seconds
    after which the same request may be answered, None where it will not.
    """

    def __init__(self, status: int, code: str, message: str, remedy: str, wait: int | None = None):
        super().__init__(f"{message}: {remedy}")
        self.status, self.code, self.message, self.remedy, self.wait = status, code, message, remedy, wait

    @property
    def content(self) -> dict[str, dict[str, str]]:
        """The body of the response."""
        return {"error": {"code": self.code, "message": self.message, "remedy": self.remedy}}
