"""Keys of phases, keys that configs leave out, and options in both spellings."""

import pytest

from train.cli import DEFAULT_CONFIG, OPTIONAL_KEYS, OPTIONS
from x2v_jax.config.flags import CommandLine, parse
from x2v_jax.errors import UserError

T2V_DMD = "--config=configs/train/shapes_t2v_dmd.py"


def parsed(*arguments: str) -> CommandLine:
    return parse([T2V_DMD, *arguments], default_config=DEFAULT_CONFIG, options=OPTIONS, optional=OPTIONAL_KEYS)


def test_a_phase_is_named_by_its_number():
    line = parsed(
        "--config.phases.0.steps=7", "--config.phases.0.learning_rate=1e-3", "--config.phases.0.critic.learning_rate=2"
    )
    phase = line.config.phases[0]
    assert (phase.steps, phase.learning_rate, phase.critic.learning_rate, phase.batch_size) == (7, 1e-3, 2.0, 16)
    assert line.is_typed("phases.0.steps") is True


def test_keys_that_configs_leave_out_are_known():
    config = parsed("--config.lora.rank=8", "--config.lora.targets=head.linear", "--config.dmd.guidance_scale=5").config
    assert config.lora.to_dict() == {"rank": 8, "targets": ("head.linear",)}
    assert config.dmd.guidance_scale == 5.0
    assert parsed().config.lora.to_dict() == {}


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config.phases.1.steps=7", "config.phases has the entries 0 to 0; write --config.phases.0.KEY=VALUE"),
        ("--config.phases.steps=7", "config.phases has the entries 0 to 0"),
        ("--config.phases.0=7", "config.phases has the entries 0 to 0"),
        ("--config.phases.-1.steps=7", "config.phases has the entries 0 to 0"),
        ("--config.phases.0.step=7", r"config has no key 'phases.0.step'; did you mean steps\?"),
        ("--config.phases.0.steps=many", "config.phases.0.steps is 'many'; give a whole number"),
        ("--config.lora.ranks=3", r"config has no key 'lora.ranks'; did you mean rank\?"),
        ("--config.lora.rank=x", "config.lora.rank is 'x'; give a whole number"),
        ("--config.dmd.guidance=3", r"config has no key 'dmd.guidance'; did you mean guidance_scale\?"),
        ("--config.loras.rank=3", "config has no key 'loras'; did you mean lora"),
    ],
)
def test_a_wrong_key_of_a_group_is_named(argument: str, sentence: str):
    with pytest.raises(UserError, match=sentence):
        parsed(argument)


def test_options_are_spelt_with_hyphens_or_underscores():
    assert parsed("--dry-run").options == parsed("--dry_run").options == {"dry_run": True}
