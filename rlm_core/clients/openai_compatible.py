"""Servers and routers that speak OpenAI's chat completions: only addresses and keys are their own."""

from typing import ClassVar

from rlm_core.clients.failures import NO_KEY
from rlm_core.clients.openai import OpenAIClient


class OpenRouterClient(OpenAIClient):
    """https://openrouter.ai; tells the cost of each call."""

    backend: ClassVar[str] = "openrouter"
    called: ClassVar[str] = "OpenRouter"
    default_base_url: ClassVar[str] = "https://openrouter.ai/api/v1"
    base_url_variable: ClassVar[str] = "OPENROUTER_BASE_URL"
    key_variable: ClassVar[str] = "OPENROUTER_API_KEY"


class VercelClient(OpenAIClient):
    """Vercel's AI Gateway."""

    backend: ClassVar[str] = "vercel"
    called: ClassVar[str] = "Vercel's AI Gateway"
    default_base_url: ClassVar[str] = "https://ai-gateway.vercel.sh/v1"
    base_url_variable: ClassVar[str] = "AI_GATEWAY_BASE_URL"
    key_variable: ClassVar[str] = "AI_GATEWAY_API_KEY"


class _OwnServer(OpenAIClient):
    """A server of the user's, which mostly wants no key."""

    def _key_of_environment(self) -> str:
        return NO_KEY

    @property
    def _limit_name(self) -> str:
        return "max_output_tokens" if self.api == "responses" else "max_tokens"


class VllmClient(_OwnServer):
    """A vLLM server; `base_url` is needed, e.g. http://localhost:8000/v1."""

    backend: ClassVar[str] = "vllm"
    called: ClassVar[str] = "vLLM"
    default_base_url: ClassVar[str] = ""
    base_url_variable: ClassVar[str] = "VLLM_BASE_URL"


class OllamaClient(_OwnServer):
    """An Ollama server."""

    backend: ClassVar[str] = "ollama"
    called: ClassVar[str] = "Ollama"
    default_base_url: ClassVar[str] = "http://localhost:11434/v1"
    base_url_variable: ClassVar[str] = "OLLAMA_BASE_URL"
