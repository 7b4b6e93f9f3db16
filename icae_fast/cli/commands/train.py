"""`icae-fast pretrain` and `icae-fast finetune`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from icae_fast.cli.options import at_home
from icae_fast.errors import ConfigError
from icae_fast.io.bundled import BUNDLED_NAME
from icae_fast.io.packages import importing, install_command, require_extra

Config = Annotated[
    Path,
    typer.Argument(help="A YAML file, or the name of an installed config (see training/configs).", callback=at_home),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, overrides the file; may be repeated.")]


def pretrain_command(config: Config, set_: Set = None) -> None:
    """Train an adapter to restore and continue texts.

    All settings are in a YAML file. A repeated run continues from the last checkpoint.
    """
    _run("pretrain", config, set_ or [])


def finetune_command(config: Config, set_: Set = None) -> None:
    """Train an adapter to answer prompts about contexts.

    All settings are in a YAML file. A repeated run continues from the last checkpoint.
    """
    _run("finetune", config, set_ or [])


def _run(kind: str, config: Path, overrides: list[str]) -> None:
    require_extra("train", "training")
    with importing("training", install_command("train")):
        from icae_fast.training.loop.recipes import RECIPES
        from icae_fast.training.loop.settings_file import installed_configs, load_settings
    path = config if config.exists() else installed_configs().get(str(config), config)
    if not path.exists():
        raise ConfigError(
            f"there is no file {config}, and no installed config of this name; "
            f"installed are {', '.join(installed_configs())}"
        )
    settings = load_settings(path, overrides)
    adapter = RECIPES[kind](settings)
    if os.environ.get("RANK", "0") != "0":
        return
    if not settings.trains_encoder:
        typer.echo(
            f"The adapter is in {adapter}, but no step has trained its encoder yet; start again with a larger "
            "train.max_steps to continue."
        )
    else:
        model = "" if settings.model.name == BUNDLED_NAME else f" --model {settings.model.name}"
        typer.echo(
            f"The adapter is in {adapter}. Try it: icae-fast compress TEXT.txt --adapter {adapter}{model} && "
            f"icae-fast restore TEXT.txt.icae --adapter {adapter}{model}"
        )
