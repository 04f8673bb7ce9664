"""FP8 inside transformers: its own formats decode what we wrote, and our method computes what we evaluate, in bytes."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from fp8.checkpoint import frozen_model, load
from fp8.checkpoint.convert import convert_folder
from fp8.checkpoint.fp8_folder import Fp8Folder
from fp8.checkpoint.quantize import Options, Scales, quantize_folder
from fp8.errors import CheckpointError, ConfigError
from fp8.nn.frozen_linear import FrozenLinear

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
hf = pytest.importorskip("fp8.hf")

Auto = transformers.AutoModelForCausalLM
ROWS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
SCHEMES = ("dynamic", "static", "block", "weight-only")
pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.build(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def written(model):
    """The checkpoint of each scheme."""

    def inputs(source, layers):
        return Scales(dict.fromkeys(layers.fp8, 2.0**-5))

    for scheme in SCHEMES:
        quantize_folder(model, model.parent / scheme, Options(scheme), inputs if scheme == "static" else None)
    return model.parent


@torch.no_grad()
def logits(model):
    return model(input_ids=ROWS).logits


def frozen_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_our_method_computes_what_is_evaluated(written, scheme, dtype):
    ours = Auto.from_pretrained(written / scheme, config=hf.serving(written / scheme), dtype=dtype)
    folder = Fp8Folder.open(written / scheme)
    assert frozen_names(ours) == set(folder.layers)
    assert torch.equal(logits(ours), logits(frozen_model(folder, dtype)))
    for name in folder.layers:
        layer, stored = ours.get_submodule(name), folder.weight(name)
        assert torch.equal(layer.codes.view(torch.uint8), stored.codes.view(torch.uint8))
        assert torch.equal(layer.scale, stored.scale) and layer.scale.dtype == torch.float32
    if dtype == torch.float32:  # in BF16 norms round elsewhere in our decoder than in transformers'
        with torch.no_grad():
            assert torch.equal(logits(ours), load(written / scheme).to(dtype)(ROWS))


@pytest.mark.parametrize("scheme", ["dynamic", "block", "weight-only"])
def test_quantizing_on_load_equals_writing_and_reading(model, written, scheme):
    read = Auto.from_pretrained(written / scheme, config=hf.serving(written / scheme))
    made = Auto.from_pretrained(model, quantization_config=hf.Fp8Config(scheme))
    assert torch.equal(logits(made), logits(read)) and frozen_names(made) == frozen_names(read)
    assert made.config.quantization_config.scheme == scheme


def test_skipped_layers_stay_and_the_head_may_come(model):
    made = Auto.from_pretrained(model, quantization_config=hf.Fp8Config(skip=["*.q_proj"], head=True))
    assert "lm_head" in frozen_names(made) and not any("self_attn.k_proj" in name for name in frozen_names(made))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_own_format_decodes_the_same_weights(written, scheme):
    theirs = Auto.from_pretrained(
        written / scheme, quantization_config=transformers.CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )
    folder = Fp8Folder.open(written / scheme)
    for name in folder.layers:
        assert torch.equal(theirs.get_submodule(name).weight, folder.weight(name).dequantize())


def test_transformers_fp8_format_decodes_the_same_weights(written, tmp_path):
    pytest.importorskip("accelerate")
    convert_folder(written / "block", tmp_path / "hf", "huggingface-fp8", None)
    theirs = Auto.from_pretrained(
        tmp_path / "hf", quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    folder = Fp8Folder.open(written / "block")
    whole = [n for n in folder.layers if all(side % 128 == 0 for side in folder.weight(n).shape)]
    assert whole
    for name in whole:
        assert torch.equal(theirs.get_submodule(name).weight, folder.weight(name).dequantize())


def test_our_method_reads_huggingface_fp8_too(written, tmp_path):
    convert_folder(written / "block", tmp_path / "hf", "huggingface-fp8", None)
    one, two = (
        Auto.from_pretrained(folder, config=hf.serving(folder)) for folder in (written / "block", tmp_path / "hf")
    )
    assert torch.equal(logits(one), logits(two))


def test_biases_tied_heads_and_encoders(tmp_path):
    for kind, auto in (("qwen2", Auto), ("tied", Auto), ("bert", transformers.AutoModel)):
        source = tiny_models.build(tmp_path / kind, kind)
        quantize_folder(source, out := tmp_path / f"{kind}-fp8")
        ours = auto.from_pretrained(out, config=hf.serving(out), dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(ours(ROWS)[0], frozen_model(Fp8Folder.open(out), torch.float32)(ROWS)[0]), kind


def test_generation_goes_on(written):
    ours = Auto.from_pretrained(written / "dynamic", config=hf.serving(written / "dynamic"))
    assert ours.generate(ROWS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 15)


def test_nothing_is_reported_missing(written, caplog):
    config = hf.serving(written / "static")
    _, told = Auto.from_pretrained(written / "static", config=config, output_loading_info=True)
    assert not any(told.values())


def test_what_cannot_be_run_is_refused(model, written, tmp_path):
    with pytest.raises(CheckpointError, match="is not quantized"):
        hf.serving(model)
    with pytest.raises(ConfigError, match="calibrated"):
        hf.Fp8Config("static")
    with pytest.raises(ConfigError, match="no setting 'skp'"):
        hf.Fp8Config(skp=[])
    mixtral = tiny_models.build(tmp_path / "mixtral", "mixtral")
    with pytest.raises(CheckpointError, match="experts of a mixture"):
        Auto.from_pretrained(mixtral, quantization_config=hf.Fp8Config())
    ours = Auto.from_pretrained(written / "dynamic", config=hf.serving(written / "dynamic"))
    with pytest.raises(ValueError, match="not serializable"):
        ours.save_pretrained(tmp_path / "saved")


@pytest.mark.gpu
def test_codes_go_to_the_gpu_with_the_model(written):
    ours = Auto.from_pretrained(written / "dynamic", config=hf.serving(written / "dynamic")).to("cuda")
    assert all(ours.get_submodule(name).codes.is_cuda for name in frozen_names(ours))
    with torch.no_grad():
        near = frozen_model(Fp8Folder.open(written / "dynamic")).cuda()(input_ids=ROWS.cuda()).logits
        assert torch.equal(ours(input_ids=ROWS.cuda()).logits, near)
