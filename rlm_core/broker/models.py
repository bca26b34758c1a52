"""The LMs of a tree of runs."""

from collections.abc import Sequence

from rlm_core.broker.pace import Pace
from rlm_core.clients.base import LMClient
from rlm_core.errors import ConfigError


class Models:
    """The clients of a run. The first is the root's; sub-calls take the second, if any, or one by name."""

    def __init__(self, clients: Sequence[LMClient]) -> None:
        self.clients = tuple(clients)
        self.root = clients[0]
        self.sub = clients[1] if len(clients) > 1 else clients[0]
        self._by_name = {client.model_name: client for client in reversed(clients)}
        paces: dict[str, Pace] = {}
        self._paces = {
            id(client): paces.setdefault(
                client.account or str(id(client)), Pace(client.rate, client.max_concurrent)
            )
            for client in clients
        }

    def for_call(self, model: str | None) -> LMClient:
        """Raises ConfigError for an unknown name, with the known ones."""
        return self.sub if model in (None, self.sub.model_name) else self.named(str(model))

    def for_child(self, model: str | None) -> LMClient:
        """The root LM of a child run. Raises ConfigError for an unknown name, with the known ones."""
        return self.root if model is None else self.named(model)

    def named(self, model: str) -> LMClient:
        if model not in self._by_name:
            raise ConfigError(f"unknown model {model!r}; known: {', '.join(sorted(self._by_name))}")
        return self._by_name[model]

    def pace(self, client: LMClient) -> Pace:
        """Of a client, whichever run of the tree asks it."""
        return self._paces[id(client)]
