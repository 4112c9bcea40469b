"""GaCLLM for RecBole: importing this package repairs RecBole and makes GaCLLM one of its models."""

from recbole_gacllm import compat, registration

compat.apply()
registration.register()
