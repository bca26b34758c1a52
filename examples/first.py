"""A question about a long text, with a scripted LM in place of a real one: runs without a key.

With a key, replace the backend by `backend="openai", backend_kwargs={"model_name": "gpt-5-mini"}`.
"""

from rlm_core import RLM, RLMLogger, ScriptedClient

TEXT = "All the king's horses and all the king's men. " * 20_000
LM = ScriptedClient(
    ["```repl\nprint(len(context), context[:40])\n```", "```repl\nFINAL(context.count('horses'))\n```"]
)

with RLM(backend=LM, environment="local", logger=RLMLogger(log_dir="logs"), verbose=True) as rlm:
    result = rlm.completion(TEXT, root_prompt="How many horses are in the text?")

print(result.response, result.usage_summary.to_dict())
