"""What a launcher gives a child of its own: flags, and an environment without the person's settings.

A setting reaches a child once, as a flag, and is then the launcher's word: a variable or a file of the person would be
read a second time, by every child, whether it is meant for it or not. API keys are not on any command line, where `ps`
shows them to everybody on the machine: they are in the environment of the router, and of nobody else.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from control_plane.lifecycle import LIFELINE_VARIABLE
from control_plane.options import EdgeOptions, EngineOptions

PREFIX: Final = "TRIPTYCH_"
OWN_VARIABLES: Final = (
    LIFELINE_VARIABLE,
    "TRIPTYCH_CACHE",  # engine.base.folders
    "TRIPTYCH_FAILPOINTS",  # control_plane.agent.process; tests arm them
    "TRIPTYCH_TRACE",  # control_plane.agent.trace
    "TRIPTYCH_REWRITE",  # tests
    "TRIPTYCH_SYSTEM_TORCH",  # scripts/install.sh
)
"""Of this prefix, and not settings."""


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """A launcher's environment, less its settings."""
    return {name: value for name, value in environment.items() if not name.startswith(PREFIX) or name in OWN_VARIABLES}


def engine_arguments(engine: EngineOptions) -> list[str]:
    """The flags that give a child these very options."""
    return _arguments(
        {
            "--model": engine.model,
            "--executor": engine.executor.value,
            "--dtype": engine.dtype.value,
            "--block-size": engine.block_size,
            "--max-model-len": engine.max_model_len,
            "--kv-cache-mib": engine.kv_cache_mib,
            "--embedding-cache-mib": engine.embedding_cache_mib,
            "--encode-image-ms": engine.encode_image_ms,
            "--codec": engine.codec,
            "--kl-budget": engine.kl_budget,
            "--profile": engine.profile,
            "--layers-per-group": engine.layers_per_group,
            "--max-num-batched-tokens": engine.step_tokens,
            "--device": engine.device.value,
            "--batching": engine.batching,
            "--tbt-slo-ms": engine.tbt_slo_ms,
            "--enable-prefix-caching": engine.prefix_cache,
        }
    )


def edge_arguments(edge: EdgeOptions) -> list[str]:
    """All but the keys."""
    return _arguments(
        {
            "--served-model-name": edge.served_model_name,
            "--chat-template": edge.chat_template,
            "--permit-special-tokens": edge.permit_special_tokens,
            "--api-key-file": edge.api_key_file,
            "--ssl-certfile": edge.ssl_certfile,
            "--ssl-keyfile": edge.ssl_keyfile,
            "--ssl-ca-certs": edge.ssl_ca_certs,
            "--queue-timeout": edge.queue_timeout_s,
            "--limit-mm-per-prompt": edge.limit_mm_per_prompt,
            "--allowed-media-domains": edge.allowed_media_domains,
        }
    )


def edge_environment(edge: EdgeOptions) -> dict[str, str]:
    """The keys. Only the child's own user, and root, can read a process's environment."""
    return {"TRIPTYCH_API_KEY": json.dumps(edge.api_keys)} if edge.api_keys else {}


def _arguments(values: Mapping[str, Any]) -> list[str]:
    """`None` is the child's own default; of several values each has the flag before it."""
    arguments: list[str] = []
    for flag, value in values.items():
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            arguments += [argument for each in value for argument in (flag, str(each))]
        elif value is not None:
            arguments += [flag, str(value)]
    return arguments
