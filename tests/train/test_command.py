"""`fp8 train` from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fp8.errors import ConfigError
from fp8.train import TrainConfig
from fp8.train.command import command

Make = Callable[..., TrainConfig]
Write = Callable[[TrainConfig], Path]


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer(rich_markup_mode="rich")
    made.command("train")(command())
    return made


def test_every_setting_is_a_flag(app: typer.Typer) -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for one in dataclasses.fields(TrainConfig):
        assert f"--{one.name.replace('_', '-')}" in shown
    assert "--resume" in shown


def test_a_run_from_a_file_and_flags_then_resumed(app: typer.Typer, make: Make, write: Write) -> None:
    flags = "--steps 4 --recipe delayed --loss-scale dynamic --skip layers.0.*"
    arguments = [str(write(make())), *flags.split()]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "after 4 steps" in done.output
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, ConfigError)
    arguments[2] = "6"
    resumed = CliRunner().invoke(app, [*arguments, "--resume"])
    assert "after 6 steps" in resumed.output
    assert "steps changed from 4 to 6" in resumed.output
    again = CliRunner().invoke(app, [*arguments, "--overwrite", "--no-compile"])
    assert again.exit_code == 0, again.output


def test_a_mistake_is_told(app: typer.Typer) -> None:
    assert "steps must be from 1" in str(CliRunner().invoke(app, ["--steps", "0"]).exception)
    assert CliRunner().invoke(app, ["--stepz", "3"]).exit_code == 2
