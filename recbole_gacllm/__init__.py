"""GaCLLM for RecBole: importing this package repairs RecBole and makes GaCLLM one of its models."""

from recbole_gacllm.plugin import compat, registration

__version__ = "0.1.0"

compat.apply()
registration.register()
