"""`python -m train`: reads the config, builds the task, trains or exports."""

import importlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from x2v_jax import shipped
from x2v_jax.config.flags import CommandLine, HelpAsked, Option, help_text, parse
from x2v_jax.config.load import load_config
from x2v_jax.errors import UserError

DEFAULT_CONFIG = "configs/shapes/base.py"
_USAGE = f"""usage: {shipped.command("train")} --config=configs/shapes/base.py [--config.KEY=VALUE ...]

Trains in config.run_dir, and goes on from the newest checkpoint there. Ctrl-C and SIGTERM save first (exit code 3)."""
OPTIONS = {
    "export": Option("write the averaged weights of the newest checkpoint as a native checkpoint, and end", "DIR"),
    "dry_run": Option("print the resolved config, parameter counts and memory of a distillation, and end"),
}
# Keys that configs leave out: --config.lora.rank=64 makes a LoRA of a training of all weights.
OPTIONAL_KEYS = {
    "lora.rank": int,
    "lora.alpha": float,
    "lora.targets": tuple,
    "causal.block": int,
    "causal.context_timestep": float,
    "causal.mode": str,
    "dmd.guidance_scale": float,
}
_STOPPED = 3
_CHECKPOINTS = ("teacher", "student", "init_from", "vae")  # keys that name one
_TASKS = {
    "vae": ("vae", "VaeTask"),
    "flow_matching": ("flow_matching", "FlowMatchingTask"),
    "dmd": ("dmd", "DmdTask"),
    "causvid": ("dmd", "CausVidTask"),
    "ode_pairs": ("ode", "OdePairs"),
    "ode_regression": ("ode", "OdeRegressionTask"),
}
_NEEDED = ("teacher", "vae")
_MAKE_DATA = ("ode_pairs",)  # they write config.output and train nothing


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code: 0 done, 2 a user's mistake, 3 stopped and saved."""
    try:
        command = parse(argv, default_config=DEFAULT_CONFIG, options=OPTIONS, optional=OPTIONAL_KEYS)
    except HelpAsked:
        from .keys import help_lines

        print(help_text(_USAGE, OPTIONS, ()), help_lines(), sep="\n\n")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from .loop import Stopped, load_ema, train

    try:
        _find_checkpoints(command)
        task = make_task(command.config)
        if command.options.get("dry_run"):
            print(_dry_run(command.config, task))
            return 0
        if command.config.task in _MAKE_DATA:
            task.run()
            print(f"wrote {command.config.output}")
            return 0
        export = command.options.get("export")
        if export is not None:
            task.export(load_ema(command.config, task), pathlib.Path(str(export)))
            print(f"wrote {export}")
            return 0
        state = train(command.config, task)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return _STOPPED
    default = pathlib.Path(str(command.config.run_dir)) / "export"
    task.export(state.ema, default, overwrite=True)
    print(f"wrote {default}")
    return 0


def _find_checkpoints(command: CommandLine) -> None:
    """Turns names of shipped checkpoints into paths, so that those of a shipped config are found from anywhere."""
    config: Any = command.config
    for name in _CHECKPOINTS:
        if isinstance(config.get(name), str):
            config[name] = shipped.locate(config[name], typed=command.is_typed(name))
            _check_there(name, config[name])


def _check_there(name: str, path: str) -> None:
    """Says which key names a checkpoint that is not there, and which training makes it."""
    if not path and name in _NEEDED:
        raise UserError(f"config.{name} is empty; give --config.{name}=FOLDER, a converted checkpoint")
    if not path or pathlib.Path(path).exists():
        return
    configs = shipped.ROOT / "configs"
    for file in sorted([*configs.glob("shapes/*.py"), *configs.glob("train/*.py")]):
        recipe = f"configs/{file.parent.name}/{file.name}"
        if file.stem != "__init__" and f"{load_config(recipe, typed=False).get('run_dir')}/export" == path:
            how = f"`{shipped.command('train')} --config={recipe}` makes it"
            raise UserError(f"config.{name} is {path!r}, which does not exist; {how}, or give --config.{name}=FOLDER")
    # Somebody's own name: what opens it says what is wrong.


def _dry_run(config: Any, task: Any) -> str:
    from .dry_run import describe
    from .tasks.distillation import Distillation

    if not isinstance(task, Distillation) or not config.get("phases"):
        raise UserError(f"--dry_run describes distillations; config.task is {config.task!r}")
    return describe(config, task)


def make_task(config: Any) -> Any:
    """The task that config.task names."""
    if config.task not in _TASKS:
        raise UserError(f"config.task is {config.task!r}; choose {', '.join(_TASKS)}")
    module, name = _TASKS[config.task]
    return getattr(importlib.import_module(f".tasks.{module}", __package__), name)(config)
