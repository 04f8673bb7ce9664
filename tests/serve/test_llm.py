"""`fp8.LLM` in vLLM's words, and the two commands over it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

import fp8
import tiny_models
from fp8.checkpoint import Options, quantize_folder
from fp8.cli import main
from fp8.errors import ConfigError, DataError, RequestError
from fp8.serve import SamplingParams
from fp8.serve.command import Conversation
from toy_engine import all_free

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    made = tiny_models.build(tmp_path_factory.mktemp("llm") / "llama", "llama")
    config = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return made


@pytest.fixture(scope="module")
def llm(folder: Any) -> fp8.LLM:
    return fp8.LLM(folder, device="cpu", block_size=16, max_num_seqs=4)


def test_the_articles_three_lines_run_with_one_import_changed(folder: Any, tmp_path: Any, monkeypatch: Any) -> None:
    tiny_models.copied(folder, tmp_path / "meta-llama" / "Llama-3.1-70B-Instruct")
    monkeypatch.chdir(tmp_path)
    from fp8 import LLM

    llm = LLM(model="meta-llama/Llama-3.1-70B-Instruct", kv_cache_dtype="fp8")
    (output,) = llm.generate("Hello, my name is")
    assert output.outputs[0].finish_reason in ("length", "stop") and len(output.outputs[0].token_ids) <= 16


def test_a_file_may_be_called_by_its_own_method(folder: Any, tmp_path: Any) -> None:
    quantize_folder(folder, tmp_path / "fp8", Options())
    llm = fp8.LLM(tmp_path / "fp8", quantization="compressed-tensors", enable_chunked_prefill=True, device="cpu")
    assert llm.generate("one", use_tqdm=False)[0].outputs[0].token_ids
    with pytest.raises(ConfigError, match="quantization cannot be 'compressed-tensors'"):
        fp8.LLM(folder, quantization="compressed-tensors", device="cpu")


def test_importing_fp8_opens_no_serving_room() -> None:
    code = "import sys, fp8; print([m for m in sys.modules if m.startswith(('fp8.serve', 'transformers', 'rich'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_answers_come_in_the_order_of_prompts(llm: fp8.LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 2, 5, 1, 7, 3)]
    prompts = ["one", [116, 119, 111], {"prompt": "three"}, {"prompt_token_ids": [52]}, "five", "six"]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 2, 5, 1, 7, 3]
    assert [o.prompt for o in outputs] == ["one", None, "three", None, "five", "six"]
    assert outputs[1].prompt_token_ids == list(b"two") and all_free(llm.engine)


def test_n_texts_differ_by_seed_and_repeat(llm: fp8.LLM) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=8, logprobs=0)
    (first,), (again,) = (llm.generate("Ahab", params, use_tqdm=False) for _ in range(2))
    texts = [o.token_ids for o in first.outputs]
    assert [o.index for o in first.outputs] == [0, 1, 2] and len({tuple(t) for t in texts}) == 3
    assert texts == [o.token_ids for o in again.outputs]
    total = sum(entry[t].logprob for t, entry in zip(texts[0], first.outputs[0].logprobs or [], strict=True))
    assert first.outputs[0].cumulative_logprob == pytest.approx(total)
    (second,) = llm.generate("Ahab", SamplingParams(seed=8, max_tokens=8), use_tqdm=False)
    assert second.outputs[0].token_ids == texts[1]


def test_a_stream_is_the_answer_in_pieces(llm: fp8.LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12)
    outputs = list(llm.stream("The sea", params))
    (whole,) = llm.generate("The sea", params, use_tqdm=False)
    assert [t for o in outputs for t in o.new_tokens] == whole.outputs[0].token_ids
    assert "".join(o.new_text for o in outputs) == whole.outputs[0].text
    assert outputs[-1].finished == whole.outputs[0].finish_reason


def test_streams_may_take_turns_and_be_left(llm: fp8.LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    one, two = llm.stream("a", params), llm.stream("b", params)
    mixed = [(next(one), next(two)) for _ in range(6)]
    assert {a.id for a, _ in mixed} != {b.id for _, b in mixed}
    left = llm.stream("c", params)
    next(left)
    left.close()
    one.close()
    two.close()
    assert all_free(llm.engine)


def test_a_conversation_is_made_by_the_models_template(llm: fp8.LLM, folder: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    params = SamplingParams(temperature=0, max_tokens=4)
    (chat,) = llm.chat(messages, params, use_tqdm=False)
    (plain,) = llm.generate("<user>hi\n<assistant>", params, use_tqdm=False)
    assert chat.prompt_token_ids == plain.prompt_token_ids and chat.outputs[0].text == plain.outputs[0].text
    assert len(llm.chat([messages, messages], params, use_tqdm=False)) == 2
    with pytest.raises(DataError, match="chat template"):
        fp8.LLM(folder, tokenizer="bytes", device="cpu").chat(messages)


def test_what_the_authors_recommend_is_the_default(folder: Any, tmp_path: Any) -> None:
    made = tiny_models.copied(folder, tmp_path / "warm")
    (made / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 256}))
    params = fp8.LLM(made, device="cpu").get_default_sampling_params()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.6, 0.9, 0, 16)
    (made / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "max_new_tokens": 3}))
    llm = fp8.LLM(made, device="cpu")
    (whole,) = llm.generate("one", use_tqdm=False)
    streamed = [token for output in llm.stream("one") for token in output.new_tokens]
    assert streamed == whole.outputs[0].token_ids and len(streamed) == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"kv_cache_dtype": "fp9"}, "Did you mean 'fp8'"),
        ({"max_model_length": 9}, "no argument 'max_model_length'. Did you mean 'max_model_len'"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2: here it is 1"),
        ({"dtype": "float32"}, "dtype='float32'"),
        ({"quantization": "int4"}, "quantization cannot be 'int4'"),
        ({"max_model_len": 10**6}, "the 128 positions"),
        ({"block_size": 7}, "block_size=7 must be a multiple of 16"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override=0"),
        ({"gpu_memory_utilization": 3}, "gpu_memory_utilization=3"),
    ],
)
def test_arguments_that_nothing_answers_to_are_refused(folder: Any, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        fp8.LLM(folder, device="cpu", **arguments)


@pytest.mark.parametrize(
    ("prompts", "params", "told"),
    [
        ("x" * 200, None, "200 tokens"),
        (["a", "b"], [SamplingParams()], "2 prompts and 1 sampling_params"),
        ([3.5], None, "a prompt is a text"),
        ([[999]], None, "token 999"),
        ([[1, 2.5]], None, "whole numbers; got"),
        ([{"text": "a"}], None, "a prompt is a text"),
    ],
)
def test_one_bad_prompt_refuses_the_call(llm: fp8.LLM, prompts: Any, params: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        llm.generate(prompts, params, use_tqdm=False)
    assert all_free(llm.engine)


@pytest.mark.parametrize(
    ("argument", "value", "held"),
    [
        ("block_size", 32, lambda e: e.cache.page_size),
        ("num_gpu_blocks_override", 5, lambda e: e.scheduler.pool.total),
        ("max_num_seqs", 3, lambda e: len(e.sampler.last)),
        ("max_num_batched_tokens", 33, lambda e: e.scheduler.max_step_tokens),
        ("enable_prefix_caching", False, lambda e: e.scheduler.prefix_caching),
        ("max_model_len", 40, lambda e: e.max_model_len),
        ("deterministic", True, lambda e: e.forward.rows > 0),
        ("enforce_eager", True, lambda e: not e.options.graphs),
        ("gpu_memory_utilization", 0.5, lambda e: e.options.memory_fraction),
    ],
)
def test_every_argument_of_vllms_arrives(folder: Any, argument: str, value: Any, held: Any) -> None:
    assert held(fp8.LLM(folder, device="cpu", **{argument: value}).engine) == value


def test_an_answer_longer_than_there_is_room_for_is_warned_of_and_ends_there(llm: fp8.LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    with pytest.warns(
        UserWarning, match=r"max_tokens=1000 is more than is left behind a prompt of 3 tokens.*holds 128"
    ):
        (answer,) = llm.generate("one", params, use_tqdm=False)
    assert answer.outputs[0].finish_reason == "length" and len(answer.outputs[0].token_ids) == 125
    (answer,) = llm.generate("one", SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert len(answer.outputs[0].token_ids) == 125, "who asks for all there is gets no warning"


def test_the_terminal_says_where_the_model_ends(folder: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["generate", str(folder), "--prompt", "one", "--max-model-len", "9", "--device", "cpu"])
    assert "holds no more than these 9 tokens" in capsys.readouterr().err


def test_a_stopped_answer_stays_said_and_frees_its_pages(llm: fp8.LLM, monkeypatch: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    screen = Console(file=io.StringIO(), soft_wrap=True)
    talk = Conversation(llm, params, None, screen)
    show, shown = screen.print, []

    def interrupted(piece: Any = "", **style: Any) -> None:
        shown.append(piece)
        if len(shown) == 5:
            raise KeyboardInterrupt
        show(piece, **style)

    monkeypatch.setattr(screen, "print", interrupted)
    talk.answer("hi")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert talk.messages[-1]["content"] == "".join(shown[:5]) and "(stopped)" in shown[5]
    assert all_free(llm.engine)
    talk.answer("oh")
    assert len(talk.messages) == 4


def test_a_chat_in_the_terminal(folder: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/reset\n\n" + "x" * 200 + "\n"))
    with pytest.raises(SystemExit) as left:
        main(["chat", str(folder), "--max-tokens", "5", "--temperature", "0", "--device", "cpu"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "/reset begins anew" in shown and "cut the prompt" in shown


def test_a_conversation_begins_anew_at_reset(llm: fp8.LLM, monkeypatch: Any) -> None:
    talk = Conversation(llm, SamplingParams(temperature=0, max_tokens=2), "Be short.", Console(file=io.StringIO()))
    lines = iter(["one", "/reset", "two", None])
    monkeypatch.setattr(talk, "ask", lambda: next(lines))
    talk.run()
    assert [m["content"] for m in talk.messages[:2]] == ["Be short.", "two"] and len(talk.messages) == 3
