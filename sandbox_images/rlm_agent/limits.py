"""Every limit on what the agent accepts, in one place. Sizes are bytes unless the name says otherwise."""

MAX_MESSAGE = 8 << 20
"""One gRPC message, either way."""
MAX_BATCH_MESSAGES = 256
MAX_BATCH_BYTES = 1 << 20
"""Messages to the host that go up together; a larger one goes alone."""
MAX_CHUNK = 1 << 20
"""One chunk of a streamed context."""
MAX_CODE = 1 << 20
MAX_PROMPT = 4 << 20
MAX_ANSWER = 4 << 20
MAX_CONTEXT = 64 << 30
MAX_FILE = 4 << 30
MAX_PATH_CHARS = 1_000

MAX_FRAME_HEADER = 1 << 20
"""JSON header of one frame from a worker: room for all that it cuts to its own limits, each character
escaped."""
MAX_FRAME_BODY = 5 << 20

MAX_SESSIONS = 256
MAX_CELLS_REMEMBERED = 4
"""Finished cells whose events a host that reconnects can still ask for."""
MAX_EVENTS = 10_000
"""Live output events of one cell; what comes later arrives as the tail when the cell ends."""
MAX_CALL_HEADER = 8 << 10
"""JSON header of one frame from a cell, which has a few short fields: a long one costs much to parse."""
MAX_REFUSED_BYTES = 4 << 20
"""Refusals of one session's calls that nobody has read."""
MAX_CALL_CONNECTIONS = 512
MAX_CALL_BYTES = 64 << 20
"""Prompts of one session without an answer, and as much in frames that have only partly arrived."""
MAX_PENDING_CALLS = 1_024
"""Calls of one session without an answer yet; a cell that makes more is held back by its socket."""
MAX_WAITING_CONNECTIONS = 64
"""To the proxy, that the host has not taken yet."""
EGRESS_CHUNK = 64 << 10
EGRESS_CLOSE_SECONDS = 30.0
MAX_VARIABLES = 256
MAX_NAME_CHARS = 200
"""Of a variable's or a type's name; a variable with a longer one is not told of."""
MAX_NOTICES = 64
MAX_OUTPUT_BYTES = 1 << 20
"""What a host may ask to be kept of a head or a tail."""
MAX_ID_CHARS = 128

OUTPUT_BYTES = 128 << 10
"""Kept from the head of a cell's stdout, from its tail, and the same of stderr."""
INTERRUPT_GRACE_SECONDS = 2.0
READY_SECONDS = 10.0
"""How long a worker may take to fork its next standby before the session counts as lost."""
LOOK_SECONDS = 10.0
"""For listing or reading variables, which may run a `__repr__` of the user's."""
