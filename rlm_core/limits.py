"""Every limit on what the host accepts from a sandbox. Sizes are bytes unless the name says otherwise."""

MAX_MESSAGE = 8 << 20
"""One gRPC message, either way."""
MAX_CODE = 1 << 20
"""Characters of one cell."""
CHUNK = 1 << 20
"""Of a streamed context."""
MAX_CONTEXT = 4 << 30
"""Bytes of the files that are read as one; they take up to four times as much memory (measured)."""
MAX_BATCH_MESSAGES = 256
"""Messages of an agent, or answers for it, that come together."""
MAX_BATCH_BYTES = 1 << 20
"""Of answers beyond which no further one goes with them."""
MAX_OUTPUT = 8 << 20
"""Streamed head of a cell's stdout or stderr; an agent that sends more is broken or hostile."""
MAX_VARIABLES = 256
MAX_NOTICES = 64
MAX_TEXT_CHARS = 500
"""Of a name, a notice, a reason or a version that an agent tells."""
MAX_ERROR_CHARS = 128 << 10
"""Of an exception's message or traceback."""
MAX_OPEN_CALLS = 4_096
"""Calls of one session at work on the host; the agent holds back long before."""
MAX_AGENT_CALLS = 1_024
"""Calls of one session that our agent lets have no answer yet (rlm_agent/limits.py)."""
MAX_ID_CHARS = 256
MAX_OPEN_CALL_BYTES = 96 << 20
"""Of the prompts of a session's calls at work; the agent holds back before (rlm_agent/limits.py: 64 MiB)."""
MAX_UNSENT_BYTES = 256 << 20
"""Of answers that an agent has not taken yet, beyond which none of its calls begins. Those that had begun by
then may each have an answer of MAX_REPLY; the broker's limits say how many that are at once."""

MAX_FAILURE_CHARS = 2_000
"""Of the text of a failed call."""

MAX_GREETING = 128 << 10
"""What an agent says of itself when it serves."""

START_SECONDS = 60.0
REATTACH_SECONDS = 30.0
"""How long a broken byte stream to a sandbox that still runs is opened again."""
WELCOME_SECONDS = 10.0
"""That an agent has to answer the host that takes it over."""
CELL_GRACE_SECONDS = 60.0
"""How long after its time and its grace a cell may take to end, before the agent counts as lost."""
CONTEXT_BYTES_PER_SECOND = 5 << 20
"""The slowest upload that is waited for."""
MAX_RECONNECTS = 10
"""Broken connections in a row in which nothing arrived."""
RECONNECT_SECONDS = 15.0
CLOSE_SECONDS = 10.0
INTERRUPT_SECONDS = 10.0
"""For an agent to say that it has heard of an interrupt."""
LAST_BREATH_SECONDS = 0.1
"""Given to an agent to have ended, before a broken connection to it is made again."""
EPITAPH_SECONDS = 1.0
"""Between a broken connection and the news that the agent has ended."""

MAX_REPLY = 5 << 20
"""An LM's answer, on its way into a cell."""
MAX_REPLIES_BYTES = 64 << 20
"""Answers of one session that are kept to be given again after a broken connection."""
