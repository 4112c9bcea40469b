"""The errors of this package.

Bad input (a key, a file, a value) raises ``ValueError``; a stage that failed on good input raises a
:class:`GaCLLMError`. Both name what was found, what is allowed and the next step.
"""

from __future__ import annotations

from recbole_gacllm.redaction import redact


class GaCLLMError(RuntimeError):
    """A stage of GaCLLM could not be finished; what it had finished is kept.

    Its message shows no key or password, whoever wrote the words in it.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class WeightsError(GaCLLMError):
    """Model weights could not be found, fetched, verified or read."""


class GenerationError(GaCLLMError):
    """The text generator could not be started or stopped working."""


class MemoryRanOutError(GenerationError):
    """The text generator stopped because memory ran out, maybe: a smaller one may do."""


class StoreError(GaCLLMError):
    """The description store is damaged, locked or cannot be written."""
