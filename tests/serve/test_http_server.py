"""`fp8 serve` as a process: how it starts, logs and leaves."""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
import subprocess
import sys
import threading
from typing import Any

import httpx2
import openai
import pytest

import tiny_models
from fp8.cli import main
from fp8.serve.http.door import ServerOptions
from fp8.serve.http.server import JsonLines, TextLines
from http_server import Slow, serving, toy_door, wait_until

LONG = {"prompt": [1, 2, 3], "max_tokens": 60, "ignore_eos": True, "stream": True, "temperature": 0}


def lines_of(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Its log, as it grows."""
    held: list[dict[str, Any]] = []
    stderr = process.stderr
    assert stderr is not None
    threading.Thread(target=lambda: held.extend(json.loads(line) for line in stderr), daemon=True).start()
    return held


def test_a_process_serves_a_checkpoint_and_drains_at_sigterm(tmp_path: Any) -> None:
    folder = tiny_models.build(tmp_path / "tiny", "llama")
    command = [sys.executable, "-m", "fp8", "serve", str(folder), "--port", "0", "--log-format", "json"]
    with subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True) as process:
        log = lines_of(process)
        wait_until(lambda: any("running on" in line["event"] for line in log), 60)
        url = next(line["event"] for line in log if "running on" in line["event"]).split()[3]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            assert client.models.list().data[0].id == "tiny"
            with httpx2.stream("POST", f"{url}/v1/completions", json=LONG | {"max_tokens": 120}) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                wait_until(lambda: httpx2.get(f"{url}/health").status_code == 503)
                with pytest.raises(openai.InternalServerError, match="leaving"):
                    client.completions.create(model="tiny", prompt="A")
                events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert process.wait(20) == 0
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    wait_until(lambda: any(line.get("status") == 200 and line.get("completion_tokens") == 120 for line in log))
    assert all({"time", "level", "event"} <= set(line) for line in log)
    assert all("traceback" not in line for line in log)


def test_what_does_not_end_in_time_is_ended_with_a_reason() -> None:
    door = toy_door(Slow(), options=ServerOptions(drain_timeout=0.3))
    with (
        serving(door) as (url, server),
        httpx2.stream("POST", f"{url}/v1/completions", json=LONG | {"max_tokens": 190}) as r,
    ):
        lines = r.iter_lines()
        next(lines)
        server.handle_exit(signal.SIGTERM, None)
        assert httpx2.post(f"{url}/v1/completions", json={"prompt": [1]}).status_code == 503
        *_, error, done = [line for line in lines if line]
        assert "had to leave" in json.loads(error[6:])["error"]["message"] and done == "data: [DONE]"


def test_a_second_signal_does_not_wait() -> None:
    with (
        serving(toy_door(Slow())) as (url, server),
        httpx2.stream("POST", f"{url}/v1/completions", json=LONG) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        for _ in range(2):
            server.handle_exit(signal.SIGINT, None)
        assert sum(line.startswith("data: {") for line in lines) < 40


def test_without_its_packages_it_says_what_to_install(monkeypatch: Any, capsys: Any) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("fastapi", "uvicorn") else real(name)
    )
    with pytest.raises(SystemExit):
        main(["serve", "anything"])
    assert "fp8 serve needs fastapi and uvicorn: pip install 'fp8[serve]'." in capsys.readouterr().err.replace("\\", "")


def test_help_and_every_other_command_need_no_web_framework() -> None:
    absent = "import sys; sys.modules['fastapi'] = sys.modules['uvicorn'] = None"
    code = f"{absent}; from fp8.cli import main; main(['serve', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--drain-timeout" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--log-format", "xml"], "text or json"), (["--api-key", ""], "empty")]
)
def test_options_that_make_no_sense_are_named(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "nowhere", *arguments])
    assert message in capsys.readouterr().err


def test_a_line_of_the_log_cannot_be_forged() -> None:
    record = logging.LogRecord("fp8.serve", logging.INFO, "", 0, "request", None, None)
    record.told = {"path": "/a\nstatus=200 b", "status": 404}
    assert TextLines().format(record).endswith(r'request path="/a\nstatus=200 b" status=404')
    assert json.loads(JsonLines().format(record))["path"] == "/a\nstatus=200 b"
