"""Laws of encoders: mean pooling, schemes, and STS-B's rank correlation. Needs transformers and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fp8.checkpoint import quantize_folder
from fp8.cli import main
from fp8.errors import ConfigError
from fp8.evaluate.judge import judge, variants
from fp8.evaluate.measurement import TaskMeasurement
from fp8.evaluate.subject import ModelSpec
from fp8.evaluate.tasks import load_task
from fp8.evaluate.transformers_engine import Encoder

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "girl", "man", "is", "styling", "brushing", "her", "his", "hair"]
PAIRS = (
    "a girl is styling her hair,a girl is brushing her hair,2.5\n"
    "a man is brushing his hair,a girl is brushing her hair,2.0\n"
    "a girl,a girl,5.0\n"
    "a man is styling,hair,0.5\n"
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("encoders") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "stsb-en-test.csv").write_text(PAIRS)
    return tmp_path


def test_a_sentence_is_the_mean_of_its_tokens_whatever_stands_beside_it(bert: Path) -> None:
    encoder = Encoder(ModelSpec(bert))
    long, short = "a girl is styling her hair", "a man"
    together, alone = encoder.embed([long, short]), encoder.embed([short])
    assert torch.allclose(together[1], alone[0], atol=1e-6)
    hidden = encoder.model(torch.tensor([[2, 4, 6, 3]])).last_hidden_state[0].mean(0)
    assert torch.allclose(alone[0], hidden / hidden.norm(), atol=1e-6)


def test_encoders_are_judged_by_rank_correlation(bert: Path, pairs: Path) -> None:
    base = ModelSpec(bert)
    task = TaskMeasurement(load_task("stsb", pairs), 2)
    told = judge([base, *variants(base, ["dynamic", "int8"])], [task], out=pairs / "out")
    one, *others = (outcome.records for outcome in told.outcomes)
    assert all("layers" in about for about in list(told.about.values())[1:])
    assert [r["score"] for r in one] == [2.5, 2.0, 0.5, 5.0]  # longest first
    for other in others:
        off = [abs(a["cosine"] - b["cosine"]) for a, b in zip(one, other, strict=True)]
        assert 0 < max(off) < 0.1
        assert other[-1]["cosine"] == pytest.approx(1.0)  # the same sentence twice


def test_an_encoder_of_codes_is_judged_by_its_codes(bert: Path, tmp_path: Path) -> None:
    exported = Encoder(ModelSpec(quantize_folder(bert, tmp_path / "made").folder))
    assert exported.about == "12 layers of codes as stored"
    texts = ["a man", "the sea is calm"]
    plain, codes = Encoder(ModelSpec(bert)).embed(texts), exported.embed(texts)
    assert 0 < float((plain - codes).norm() / plain.norm()) < 0.1


def test_an_encoder_has_no_cache_and_says_so(bert: Path) -> None:
    with pytest.raises(ConfigError, match="no KV cache"):
        Encoder(ModelSpec(bert, kv_cache="fp8"))


def test_the_command_judges_an_encoder(bert: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", str(bert), "--tasks", "stsb", "--data", str(pairs), "--scheme", "block", "--out", str(pairs / "o")]
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--json"])
    assert ended.value.code == 0
    told = capsys.readouterr()
    assert "stsb, spearman" in told.err
    assert len(json.loads(told.out)["measurements"]["stsb"][1]["records"]) == 4
