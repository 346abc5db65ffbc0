"""What `accelerate launch` asks of several processes, as its configuration leaves it in the
environment.

DeepSpeed's ZeRO is asked for there and done by FSDP2 (`sharding.py`): what its stages spread is the
same, and DeepSpeed's own engine would bring its own optimizer and its own checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from kvsmith.errors import explain

Sharding = Literal["none", "gradients", "weights"]
STAGES: dict[str, Sharding] = {"0": "none", "2": "gradients", "3": "weights"}
ZERO = "ACCELERATE_DEEPSPEED_"


def asked_sharding(environment: Mapping[str, str], processes: int) -> Sharding:
    """What processes spread among them.

    Args:
        environment: of this process.
        processes: how many there are.

    Returns:
        `none`: every process holds all; `gradients`: weights are whole from the forward to the
        backward pass, gradients and moments are spread; `weights`: all is.

    Raises:
        ValueError: a stage, an offload or a file of DeepSpeed's that this has not.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        asked = _zero(environment)
    elif environment.get("ACCELERATE_USE_FSDP") == "true":
        whole = environment.get("FSDP_RESHARD_AFTER_FORWARD") == "false"
        asked = "gradients" if whole else "weights"
    else:
        asked = "none"
    return asked if processes > 1 else "none"


def _zero(environment: Mapping[str, str]) -> Sharding:
    where, remedy = "deepspeed_config", "Use conf/launch/deepspeed.yaml or conf/launch/fsdp2.yaml."
    stage = environment.get(f"{ZERO}ZERO_STAGE", "2")
    if stage not in STAGES:
        expected = f"one of {', '.join(STAGES)}"
        raise ValueError(explain(where, "zero_stage", expected, stage, remedy))
    for name in ("offload_optimizer_device", "offload_param_device"):
        if (device := environment.get(f"{ZERO}{name.upper()}", "none")) != "none":
            raise ValueError(explain(where, name, "none", device, remedy))
    if (file := environment.get(f"{ZERO}CONFIG_FILE")) is not None:
        raise ValueError(explain(where, "deepspeed_config_file", "left out", file, remedy))
    if (pieces := environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        remedy = f"Give train.py pieces={pieces} instead."
        raise ValueError(explain(where, "gradient_accumulation_steps", "1", pieces, remedy))
    return STAGES[stage]
