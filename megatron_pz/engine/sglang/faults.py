"""What can go wrong between the trainer and a server."""

from megatron_pz.errors import EngineError


class ServerLost(EngineError):
    """No answer: the connection was refused or broken, or the server hangs. The request may be asked again."""


class ServerBusy(EngineError):
    """The server or a router said "not now" (HTTP 503 or 429). The request may be asked again."""


class ServerRefused(EngineError):
    """The server answered, and said no. Asking again would not help.

    Args:
        status: of HTTP.
        told: the server's words.
    """

    def __init__(self, url: str, path: str, status: int, told: str) -> None:
        super().__init__(f"{url}{path} answered HTTP {status}: {told[:2000]}")
        self.url, self.status, self.told = url, status, told
