"""What one request may ask for. Each limit is refused in one line that names the value and the limit."""

from dataclasses import dataclass

from schemas.errors import FrontalisError, SettingsError


class TooLargeError(FrontalisError):
    """The body of a request is larger than the limit."""


class OverloadedError(FrontalisError):
    """Too many queries wait already."""


class TooSlowError(FrontalisError):
    """A request took longer than the limit."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all together.

    Attributes:
        body: bytes of a request body.
        queries: ids or vectors in a request.
        k: neighbours a query.
        neighbours: queries · k · modes of a request.
        seconds: from the first byte of a request to its answer.
        waiting: queries of all requests that wait for a search.
    """

    body: int = 16 * 2**20
    queries: int = 1_000
    k: int = 1_000
    neighbours: int = 100_000
    seconds: float = 30.0
    waiting: int = 10_000

    def check(self, queries: int, k: int, modes: int) -> None:
        """Refuse a request with a SettingsError if it asks for too much."""
        if not 1 <= queries <= self.queries:
            raise SettingsError(f"{queries:,} queries: pass 1 to {self.queries:,} ids or vectors a request.")
        if not 1 <= k <= self.k:
            raise SettingsError(f"k {k}: must be 1 to {self.k:,}.")
        if queries * k * modes > self.neighbours:
            asked = f"{queries:,} queries with k = {k:,} in {modes} modes"
            raise SettingsError(f"{asked}: {self.neighbours:,} neighbours a request at most.")
