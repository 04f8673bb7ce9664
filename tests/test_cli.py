"""The command line: what it prints, what it refuses, and that a mistake ends in one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fp8 import __version__
from fp8.cli import app, main
from fp8.errors import FormatError
from fp8.formats import FORMATS


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_formats_compares_all(capsys) -> None:
    code, out, _ = run(capsys, "formats")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == list(FORMATS)
    e4m3 = next(line for line in out.splitlines() if line.startswith("e4m3 "))
    assert e4m3.split()[:12] == ["e4m3", "8", "4+3", "7", "448", "2^-6", "2^-9", "8", "1/8", "18", "no", "yes"]


def test_formats_as_json_is_strict_json(capsys) -> None:
    rows = json.loads(run(capsys, "formats", "--json")[1])
    assert {row["name"]: row["max"] for row in rows}["e5m2"] == 57344
    assert json.loads(run(capsys, "formats", "--json", "-f", "e5m2")[1]) == [r for r in rows if r["name"] == "e5m2"]
    one = json.loads(run(capsys, "formats", "inf", "--json")[1])
    assert (one["code"], one["value"], one["below"], one["above"]) == (0x7F, "nan", 448, "nan")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["3.14"],
            ["3.14 in e4m3 is 3.25, code 0x45", "1000", "101", "2^1", "+0.11", "3.503 %", "3 below, 3.25 above"],
        ),
        (["-3.14", "--format", "e5m2"], ["-3.14 in e5m2 is -3, code 0xc2", "10000", "-3.5 below, -3 above"]),
        (["--code", "0x7e"], ["448 in e4m3 is 448, code 0x7e", "416 below, none above"]),
        (["500"], ["500 in e4m3 is 448", "saturated"]),
        (["1e-5"], ["1e-05 in e4m3 is 0", "flushed to zero"]),
        (["1e-3"], ["2^-6 (subnormal)", "x 0.125"]),
        (["inf", "-f", "e5m2"], ["inf in e5m2 is inf, code 0x7c"]),
        (["2^-127", "-f", "e8m0"], ["code 0x00", "2^(0 - 127)"]),
        (["-5.5", "-f", "int8"], ["-5.5 in int8 is -6, code 0xfa", "two's complement"]),
    ],
)
def test_formats_draws_one_number(capsys, argv: list[str], expected: list[str]) -> None:
    code, out, _ = run(capsys, "formats", *argv)
    assert code == 0
    assert [text for text in expected if text not in out] == []


def test_formats_lists_all_codes(capsys) -> None:
    _, out, _ = run(capsys, "formats", "--list")
    assert all(f"0x{code:02x}" in out for code in range(256))
    listed = json.loads(run(capsys, "formats", "--list", "--json", "-f", "e5m2")[1])
    assert [row["code"] for row in listed] == list(range(256))
    assert listed[0x7B]["value"] == 57344


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["3.14", "-f", "e4m33"], "Did you mean 'e4m3'?"),
        (["three"], "'three' is not a number"),
        (["--fromat"], "'--fromat' is not a number"),
        (["--code", "seven"], "'seven' is not a code"),
        (["--code", "300"], "outside"),
        (["1", "--code", "1"], "not both"),
        (["nan", "-f", "e2m1"], "no code for nan"),
        (["--list", "-f", "fp32"], "too many to list"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, argv: list[str], message: str) -> None:
    code, out, err = run(capsys, "formats", *argv)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err


def test_an_error_message_is_printed_as_written(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise FormatError("shape [2, 3] is [bold]not[/] square")

    monkeypatch.setattr("fp8.cli.app", fails)
    assert run(capsys)[2] == "error: shape [2, 3] is [bold]not[/] square\n"


def test_help_teaches(capsys) -> None:
    assert "fp8 formats 3.14 --format e4m3" in run(capsys, "formats", "--help")[1]
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "formats" in out
    assert run(capsys, "--version")[1] == f"fp8 {__version__}\n"


def test_every_command_has_an_example() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert f"fp8 {name}" in (command.callback.__doc__ or ""), f"fp8 {name} --help shows no example"


def test_python_m_fp8() -> None:
    done = subprocess.run([sys.executable, "-m", "fp8", "formats", "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
