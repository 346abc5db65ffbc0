"""Launch configurations as accelerate reads them, and weights spread over processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvsmith.pipeline.training.launch import ZERO, asked_sharding
from kvsmith.pipeline.training.sharding import shard, spread_again

ROOT = Path(__file__).resolve().parents[2]
LAUNCHES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_configurations_are_accelerates(name: str) -> None:
    """Read by accelerate, merged and turned into an environment as its launcher does."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    path = str(ROOT / "conf" / "launch" / f"{name}.yaml")
    found = load_config_from_file(path)
    assert found.num_processes == 8 and found.distributed_type.value == LAUNCHES[name]
    words = ["--config_file", path, "--main_process_port", "0", "train.py", "cla=factor2"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if name == "deepspeed":
        arguments.deepspeed_fields_from_accelerate_config = ""
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    want = {"ddp": "none", "fsdp2": "weights", "deepspeed": "weights"}
    assert asked_sharding(environment, 8) == want[name]
    assert asked_sharding(environment, 1) == "none"


def test_what_zero_offers_beyond_is_one_line() -> None:
    zero = {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert asked_sharding(zero, 2) == "gradients"  # DeepSpeed's own default
    assert asked_sharding({**zero, f"{ZERO}ZERO_STAGE": "0"}, 2) == "none"
    for more, words in (
        ({f"{ZERO}ZERO_STAGE": "1"}, "one of 0, 2, 3, got 1"),
        ({f"{ZERO}OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device must be none, got nvme"),
        ({f"{ZERO}OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device must be none"),
        ({f"{ZERO}CONFIG_FILE": "ds.json"}, "left out, got ds.json"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "pieces=4"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            asked_sharding({**zero, **more}, 2)
        assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("keep", [False, True])
def test_spread_weights_are_the_optimizers_after_a_forward_pass(
    tmp_path: Path, micro_llama: Any, keep: bool
) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net, ids = micro_llama(), torch.arange(2, 66).view(4, 16)
        want = net(ids).logits
        shard(net, 1, keep)
        before = dict(net.named_parameters())
        assert torch.equal(net(ids).logits, want)
        together = [n for n, w in net.named_parameters() if w is not before[n]]
        assert len(together) == (len(before) if keep else 3)  # by default the root's three
        spread_again(net)
        assert all(w is before[n] for n, w in net.named_parameters())
    finally:
        torch.distributed.destroy_process_group()
