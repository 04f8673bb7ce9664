"""`fp8.convert` says what became of each module and why, changes nothing when it refuses, and can be undone exactly."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.errors import ConvertError, RecipeError
from fp8.nn import Report
from fp8.recipe import Recipe


class Odd(nn.Linear):
    """A subclass with a forward of its own: what it does with its weight is its own affair."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.thin = nn.Conv2d(2, 2, 3, padding=1, groups=2)
        self.odd = Odd(8, 8)
        self.double = nn.Linear(8, 8).double()
        self.scale = nn.Parameter(torch.ones(8))
        self.lm_head = nn.Linear(8, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.block(self.embedding(tokens)) * self.scale
        x = self.odd(self.attend(x, x, x)[0])
        image = self.thin(self.conv(x.unsqueeze(1)))
        return self.lm_head(x + image.mean(1))


def model() -> Model:
    torch.manual_seed(0)
    return Model()


TOKENS = torch.arange(6).view(2, 3)


# --------------------------------------------------------------------------- what becomes FP8, and why not


def test_the_report_gives_a_reason_for_every_module_that_holds_parameters() -> None:
    report = fp8.convert(model(), skip=["block.3"])
    assert report.converted == ["block.0", "attend", "conv"]
    assert report.kept == {
        "": "no converter is registered for Model (fp8.register adds one)",
        "embedding": "an embedding is a look-up, not a product",
        "block.2": "normalization stays in high precision",
        "block.3": "skipped by request ('block.3')",
        "thin": "a convolution in 2 groups has products too thin for FP8",
        "odd": "no converter is registered for Odd (fp8.register adds one)",
        "double": "its parameters are float64",
        "lm_head": "output head (head=True converts it)",
    }


def test_the_share_counts_parameters() -> None:
    """8 * 16 + 16 of 8 * 16 + 16 + 16 * 8 + 8 parameters: 144 of 280."""
    report = fp8.convert(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), skip=["1"])
    assert report.share == 144 / 280
    assert "1 FP8 layers, 51.4% of the parameters" in str(report)


def test_a_report_is_plain_data_and_readable() -> None:
    report = fp8.convert(model())
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["recipe"] == report.recipe.to_dict()
    assert {
        "name": "conv",
        "type": "Conv2d",
        "fp8": True,
        "reason": "recipe tensorwise",
        "parameters": 20,
        "ran": None,
    } in plain["decisions"]
    assert all(decision.name in str(report) for decision in report.decisions)


def test_a_layer_is_fp8_only_if_it_ran() -> None:
    converted = model()
    report = fp8.convert(converted, head=True).trace(converted.eval(), TOKENS)
    assert {d.name for d in report.decisions if d.ran} == {"block.0", "block.3", "attend", "conv", "lm_head"}


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ("block.*", {"block.0", "block.3"}),
        (["*.0", "conv"], {"block.0", "conv"}),
        (["*"], {"block.0", "block.3", "attend", "conv"}),
        ((), set()),
    ],
)
def test_skip_takes_patterns(skip: object, kept: set[str]) -> None:
    everything = {"block.0", "block.3", "attend", "conv"}
    assert set(fp8.convert(model(), skip=skip).converted) == everything - kept


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    untouched = model()
    with pytest.raises(ConvertError, match=r"skip='blok\.\*' matches no module; the first are 'embedding', 'block'"):
        fp8.convert(untouched, skip=["block.0", "blok.*"])
    assert type(untouched.conv) is nn.Conv2d


def test_a_shared_module_goes_by_all_its_names() -> None:
    def build() -> nn.ModuleDict:
        shared, last = nn.Linear(4, 4), nn.Linear(4, 4)
        return nn.ModuleDict({"a": shared, "b": shared, "c": last, "lm_head": last})

    assert fp8.convert(build()).converted == ["a"]
    assert fp8.convert(build(), skip=["b"], head=True).converted == ["c"]


def test_overrides_choose_by_name() -> None:
    converted = model()
    recipe = Recipe(overrides=(("block.0", "rowwise"), ("block.*", None), ("attend", "blockwise")))
    report = fp8.convert(converted, recipe)
    assert report.kept["block.3"] == "kept by the recipe's overrides"
    assert converted.block[0].recipe == Recipe.of("rowwise")
    assert converted.attend.fp8_out.recipe == Recipe.of("blockwise")
    assert converted.conv.fp8.recipe == Recipe()


def test_converting_again_changes_the_recipe() -> None:
    converted = model()
    fp8.convert(converted, "delayed")
    fp8.convert(converted, "rowwise")
    assert {part.recipe.name for part in converted.modules() if isinstance(part, fp8.nn.Fp8Products)} == {"rowwise"}
    assert not any("delayed" in key for key in converted.state_dict())


def test_our_own_layers_get_recipe_and_name() -> None:
    own = nn.Sequential(
        fp8.Linear(4, 4), fp8.TransformerLayer(8, 16, 2), fp8.Conv2d(1, 1, 1), fp8.MultiheadAttention(8, 2)
    )
    report = fp8.convert(own, "rowwise")
    assert report.converted == ["0", "1.attention.qkv", "1.attention.out", "1.mlp.up", "1.mlp.down", "2", "3"]
    with fp8.count_products() as products, torch.no_grad():
        own[1](torch.randn(1, 3, 8))
    assert products.layers() == {"1.attention.qkv", "1.attention.out", "1.mlp.up", "1.mlp.down"}


def test_the_root_itself_can_be_a_layer() -> None:
    root = nn.Linear(4, 4)
    assert fp8.convert(root).converted == [""]
    assert isinstance(root, fp8.Linear)
    assert type(fp8.revert(root)) is nn.Linear


# --------------------------------------------------------------------------- tied weights, heads


def test_a_head_is_known_by_its_name_or_by_sharing_the_embeddings_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 8)
            self.inner = nn.Linear(8, 8)
            self.to_words = nn.Linear(8, 10, bias=False)
            self.to_words.weight = self.words.weight

    tied = Tied()
    report = fp8.convert(tied)
    assert report.converted == ["inner"]
    assert report.kept["to_words"] == "output head (head=True converts it)"
    assert fp8.convert(tied, head=True).converted == ["inner", "to_words"]
    assert tied.to_words.weight is tied.words.weight
    tied.to_words(torch.randn(2, 8)).sum().backward()
    assert tied.words.weight.grad is not None


def test_layers_that_share_a_weight_each_have_their_codes_of_it() -> None:
    pair = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pair[1].weight = pair[0].weight
    fp8.convert(pair)
    optimizer = torch.optim.SGD(pair.parameters(), 0.1)
    fp8.attach(pair, optimizer)
    pair(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    assert pair[0].weight is pair[1].weight
    codes = fp8.quantize(pair[0].weight).codes.view(torch.uint8)
    assert torch.equal(pair[0].fp8.codes.view(torch.uint8), codes)
    assert torch.equal(pair[1].fp8.codes.view(torch.uint8), codes)


# --------------------------------------------------------------------------- undoing


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_revert_restores_types_parameters_and_results(recipe: str) -> None:
    """Parameter objects, state-dict keys, hooks and results are the same before, after, and (but results) in
    between."""
    once = model()
    called = []
    once.block[0].register_forward_hook(lambda *_: called.append(1))
    types = {name: type(m) for name, m in once.named_modules()}
    parameters = {name: id(p) for name, p in once.named_parameters()}
    keys, y = list(once.state_dict()), once(TOKENS)
    fp8.convert(once, recipe, head=True)
    assert {name: id(p) for name, p in once.named_parameters()} == parameters
    assert [key for key in once.state_dict() if ".delayed." not in key] == keys
    assert not torch.equal(once(TOKENS), y)
    fp8.revert(once)
    assert {name: type(m) for name, m in once.named_modules()} == types
    assert {name: id(p) for name, p in once.named_parameters()} == parameters
    assert list(once.state_dict()) == keys
    assert torch.equal(once(TOKENS), y)
    assert len(called) == 3
    assert "fp8" not in once.block[0].__dict__["_modules"]


def test_an_optimizer_made_before_goes_on_after() -> None:
    once = model()
    optimizer = torch.optim.AdamW(once.parameters(), lr=0.1)
    fp8.convert(once)
    before = once.block[0].weight.detach().clone()
    once(TOKENS).sum().backward()
    optimizer.step()
    assert not torch.equal(once.block[0].weight, before)


def test_modes_and_devices_are_kept() -> None:
    once = model().eval()
    fp8.convert(once, "delayed")
    assert not any(m.training for m in once.modules())
    assert all(m.training for m in once.train().modules())


def test_a_converted_model_can_be_copied_and_pickled() -> None:
    import io

    once = model()
    fp8.convert(once, "rowwise")
    buffer = io.BytesIO()
    torch.save(once, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(once), torch.load(buffer, weights_only=False)):
        assert torch.equal(other.eval()(TOKENS), once.eval()(TOKENS))


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_before_anything_changes(bad: float) -> None:
    once = model()
    with torch.no_grad():
        once.attend.in_proj_weight[0, 0] = bad
    types = [type(m) for m in once.modules()]
    with pytest.raises(
        ConvertError, match=r"attend\.in_proj_weight holds NaN or Inf.*skip=\['attend'\].*Nothing was changed"
    ):
        fp8.convert(once)
    assert [type(m) for m in once.modules()] == types
    assert fp8.convert(once, skip=["attend"]).converted == ["block.0", "block.3", "conv"]


def test_what_cannot_be_converted_is_said_in_words() -> None:
    for wrong, words in ((lambda x: x, "got function"), ("model", "got str")):
        with pytest.raises(ConvertError, match=words):
            fp8.convert(wrong)
    with pytest.raises(ConvertError, match="skip takes names"):
        fp8.convert(model(), skip=[0])
    assert fp8.convert(model(), skip=None).converted


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_a_model_on_the_meta_device_is_converted_there_and_made_real_later(recipe: str) -> None:
    with torch.device("meta"):
        born = model()
    assert fp8.convert(born, recipe).converted == ["block.0", "block.3", "attend", "conv"]
    assert all(t.is_meta for t in born.state_dict().values() if t.dtype != torch.int64)


def test_a_lazy_layer_waits_for_its_shape() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    report = fp8.convert(lazy)
    assert report.kept == {"0": "its parameters have no shape yet: run the model once, then convert"}
    lazy(torch.ones(2, 3))
    assert fp8.convert(lazy).converted == ["0", "1"]


def test_a_trace_leaves_running_statistics_and_modes_as_they_are() -> None:
    once = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout().eval())
    report, before = fp8.convert(once), once[1].running_mean.clone()
    assert report.trace(once, torch.randn(2, 1, 6, 6)).decisions[0].ran
    assert torch.equal(once[1].running_mean, before)
    assert [m.training for m in once] == [True, True, False]


def test_an_unknown_recipe_changes_nothing() -> None:
    once = model()
    with pytest.raises(RecipeError, match="Did you mean 'blockwise'"):
        fp8.convert(once, "blokwise")
    assert type(once.conv) is nn.Conv2d


def test_attention_that_adds_its_own_keys_is_kept() -> None:
    holder = nn.ModuleDict(
        {"a": nn.MultiheadAttention(8, 2, add_bias_kv=True), "b": nn.MultiheadAttention(8, 2, add_zero_attn=True)}
    )
    report = fp8.convert(holder)
    assert report.converted == []
    assert set(report.kept.values()) == {"attention with bias_k or add_zero_attn is not supported"}


def test_only_if_faster_keeps_everything_on_a_cpu_and_says_why() -> None:
    report = fp8.convert(model(), only_if_faster=True)
    assert report.converted == []
    assert report.kept["conv"] == "not faster: the tensors are on cpu; it needs a CUDA device"


def test_the_report_stays_with_the_model_and_can_be_written() -> None:
    once = model()
    report = fp8.convert(once, "rowwise", skip=["conv"])
    assert once.fp8_report is report
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert copy.deepcopy(once).fp8_report == report
    assert not hasattr(fp8.revert(once), "fp8_report")
    with pytest.raises(ConvertError, match=r"no report of a conversion: KeyError\('decisions'\)"):
        Report.from_dict({"recipe": report.recipe.to_dict()})


@pytest.mark.gpu
def test_only_if_faster_converts_large_layers_and_keeps_small_ones() -> None:
    sizes = nn.ModuleDict({"large": nn.Linear(8192, 8192), "small": nn.Linear(64, 64)}).cuda()
    report = fp8.convert(sizes, only_if_faster=True, tokens=8192)
    assert report.converted == ["large"]
    assert "times BF16 predicted at 8192 rows" in report.kept["small"]
