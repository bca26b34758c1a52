"""Portkey's AI gateway, by its official SDK."""

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import portkey_ai

from rlm_core.clients.base import LMRequest
from rlm_core.clients.openai import OpenAIClient
from rlm_core.errors import ConfigError


class PortkeyClient(OpenAIClient):
    """Keyword names are those of the original library; unknown ones go to `portkey_ai.AsyncPortkey`."""

    backend: ClassVar[str] = "portkey"
    called: ClassVar[str] = "Portkey"
    default_base_url: ClassVar[str] = "https://api.portkey.ai/v1"
    base_url_variable: ClassVar[str] = "PORTKEY_GATEWAY_URL"
    key_variable: ClassVar[str] = "PORTKEY_API_KEY"
    errors: ClassVar[Any] = importlib.import_module("portkey_ai._vendor.openai")
    """It brings a copy of OpenAI's SDK, whose exceptions it lets through."""

    def __init__(self, model_name: str | None = None, **kwargs: Any) -> None:
        if kwargs.get("api", "chat") != "chat":
            raise ConfigError("backend 'portkey' speaks chat completions only")
        super().__init__(model_name, **kwargs)

    def _make_sdk(self, api_key: str | None, **arguments: Any) -> Any:
        max_retries, timeout = arguments.pop("max_retries"), arguments.pop("timeout")
        key = api_key or self._key_of_environment()
        made = portkey_ai.AsyncPortkey(api_key=key, base_url=self.base_url, **arguments)
        made.openai_client.max_retries, self._timeout = max_retries, timeout
        return made

    def _hints(self, request: LMRequest) -> dict[str, Any]:
        return {"timeout": self._timeout}

    async def _chat(self, arguments: Mapping[str, Any]) -> Any:
        return await self._client.chat.completions.create(**arguments)

    async def aclose(self) -> None:
        sdk: Any = self._client
        await sdk.openai_client.close()
