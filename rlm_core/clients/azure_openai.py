"""Azure's OpenAI service, by OpenAI's official SDK."""

import os
from typing import Any, ClassVar
from urllib.parse import urlsplit

import openai

from rlm_core.clients.openai import OpenAIClient, only_what_was_passed, with_fast_http
from rlm_core.errors import ConfigError

DEFAULT_API_VERSION = "2024-12-01-preview"
AZURE = (".azure.com", ".azure.us", ".azure.cn")


class AzureOpenAIClient(OpenAIClient):
    """`azure_endpoint`, `api_version` and `azure_deployment` are Azure's own, or come from
    AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_API_VERSION and AZURE_OPENAI_DEPLOYMENT."""

    backend: ClassVar[str] = "azure_openai"
    called: ClassVar[str] = "Azure OpenAI"
    base_url_variable: ClassVar[str] = "AZURE_OPENAI_ENDPOINT"
    key_variable: ClassVar[str] = "AZURE_OPENAI_API_KEY"
    default_base_url: ClassVar[str] = ""

    def __init__(
        self, model_name: str | None = None, azure_endpoint: str | None = None, **kwargs: Any
    ) -> None:
        if not (azure_endpoint or os.environ.get(self.base_url_variable)):
            raise ConfigError(f"backend {self.backend!r} needs azure_endpoint, or {self.base_url_variable}")
        super().__init__(model_name, base_url=azure_endpoint, **kwargs)

    def _is_elsewhere(self) -> bool:
        """Whether it is no resource at Azure, nor the one that the environment's key is for."""
        host = urlsplit(self.base_url).hostname or ""
        return not host.endswith(AZURE) and self.base_url != os.environ.get(self.base_url_variable)

    def _make_sdk(self, api_key: str | None, **arguments: Any) -> openai.AsyncAzureOpenAI:
        url, arguments = with_fast_http(self.base_url, arguments)
        version = arguments.pop("api_version", None) or os.environ.get("AZURE_OPENAI_API_VERSION")
        deployment = arguments.pop("azure_deployment", None) or os.environ.get("AZURE_OPENAI_DEPLOYMENT")
        self.resolved = {**self.resolved, "version": version or "", "deployment": deployment or ""}
        own = {"azure_ad_token", "azure_ad_token_provider"} & arguments.keys()
        made = openai.AsyncAzureOpenAI(
            api_key=api_key or (None if own else self._key_of_environment()),
            azure_endpoint=url,
            api_version=version or DEFAULT_API_VERSION,
            azure_deployment=deployment,
            **arguments,
        )
        only_what_was_passed(made, arguments)
        if api_key and not own:  # it would be sent in the place of the key that was passed
            made._azure_ad_token = None
        return made
