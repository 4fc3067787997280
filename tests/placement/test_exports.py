"""An export makes its training stack adapt exactly the placement, or says what the stack cannot say."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget
from plop_ext.placement import Placement, exports
from plop_ext.placement.exports._rules import by_substring
from plop_ext.placement.exports._stack import Stack
from tests.support.gain_tables import scores, table
from tests.support.placed_models import CASES, linear_names, llama, placed_on, tiny_mixture
from tests.support.stack_readers import OWN, PEFT, call_in

STACKS = exports.stacks()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stack", sorted(PEFT))
def test_what_ends_in_peft_gives_exactly_the_placement(stack: str, case: str) -> None:
    text = exact(CASES[case](llama()), stack)
    if text is not None:
        config = LoraConfig(**PEFT[stack](text))
        assert config.lora_dropout == 0 and isinstance(config.target_modules, set)
        verify(case, tuple(sorted((key, repr_of(value)) for key, value in config.to_dict().items())))


@cache
def verify(case: str, fields: tuple[tuple[str, str], ...]) -> None:
    """Wrap the model of a case with a configuration; stacks whose configurations are equal share the check."""
    model = llama()
    placement = CASES[case](model)
    wrapped = get_peft_model(model, LoraConfig(**{key: ast.literal_eval(value) for key, value in fields}))
    placement.verify(wrapped)
    assert {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in wrapped.base_model.model.named_modules()
        if isinstance(layer, LoraLayer)
    } == {name: (rank, 2.0) for name, rank in placement.ranks_at().items()}


def repr_of(value: Any) -> str:
    """The same text for equal fields of a configuration."""
    return repr(sorted(value) if isinstance(value, set) else getattr(value, "value", value))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stack", sorted(OWN))
def test_what_has_a_rule_of_its_own_gives_exactly_the_placement(stack: str, case: str) -> None:
    model = llama()
    placement = CASES[case](model)
    text = exact(placement, stack)
    if text is not None:
        expected = {name: (rank, 2 * rank) for name, rank in placement.ranks_at().items()}
        assert OWN[stack](text, linear_names(model)) == expected


def exact(placement: Placement, stack: str) -> str | None:
    """The export, or None where the description of the stack says why there is none."""
    description = exports.stack_named(stack)
    made = exports.plan(placement, stack, lossy=True)
    if not made.losses:
        return placement.export(stack)
    with pytest.raises(InputError, match=r"cannot be exported to .* exactly") as caught:
        placement.export(stack)
    assert all(line in str(caught.value) for line in made.losses)
    reasons = "; ".join(made.losses)
    assert ("one rank" in reasons) == bool(placement.ranks and not description.ranks)
    assert ("one alpha" in reasons) == bool(
        placement.ranks and description.ranks and not description.alphas.per_module
    )
    assert ("also adapt" in reasons) <= (stack == "torchtune")
    return None


def test_every_stack_is_read_by_a_test() -> None:
    assert set(STACKS) == set(PEFT) | set(OWN)
    for name in STACKS:
        assert exports.stack_named(name).peft == (name in PEFT)


def test_the_cases_are_exact_where_a_stack_can_say_them() -> None:
    model = llama()
    inexact = {
        (stack, case)
        for case, make in CASES.items()
        for stack in STACKS
        if exports.plan(make(model), stack, lossy=True).losses
    }
    uneven = {"axolotl", "lycoris", "peft", "unsloth"}
    assert inexact == {(stack, "ranks") for stack in STACKS if stack not in uneven} | {
        ("torchtune", case) for case in ("types", "one module", "a few", "q everywhere, k once")
    }


@pytest.mark.parametrize("stack", sorted(PEFT))
def test_stacked_experts_are_exact_or_refused(stack: str) -> None:
    model = tiny_mixture()
    placement = placed_on(model, lambda name: re.search(r"0\.mlp\.experts\.|v_proj$", name), parameters=True)
    assert any(target.parameter for target in placement.lora_targets)
    if not exports.stack_named(stack).parameters:
        with pytest.raises(InputError, match=r"adapts no parameters of a module: `model.layers.0.mlp.experts.\w+`"):
            placement.export(stack)
        return
    placement.verify(get_peft_model(model, LoraConfig(**PEFT[stack](placement.export(stack)))))


@pytest.mark.parametrize("stack", [name for name in sorted(PEFT) if exports.stack_named(name).parameters])
def test_experts_alone_bring_no_default_modules(stack: str) -> None:
    model = tiny_mixture()
    placement = placed_on(model, lambda name: name == "model.layers.1.mlp.experts.down_proj", parameters=True)
    placement.verify(get_peft_model(model, LoraConfig(**PEFT[stack](placement.export(stack)))))


@pytest.mark.parametrize("stack", [name for name in STACKS if not exports.stack_named(name).parameters])
def test_nothing_is_written_where_nothing_is_left(stack: str) -> None:
    placement = placed_on(tiny_mixture(), lambda name: "experts.down" in name, parameters=True)
    with pytest.raises(InputError, match="nothing else is placed"):
        placement.export(stack, lossy=True)


@pytest.mark.parametrize("stack", sorted(OWN))
def test_dense_parameters_are_modules_where_peft_is_not_asked(stack: str) -> None:
    dense = LoraTarget("model.layers.0.mlp.down_proj.weight", True, 20, (8, 12))
    other = LoraTarget("model.layers.1.mlp.down_proj.weight", True, 20, (8, 12))
    placement = Placement(("a",), ("t",), "types", "x", "M", (dense,), left_out=(other,))
    names = [name.removesuffix(".weight") for name in (dense.name, other.name)]
    if stack == "torchtune":
        with pytest.raises(InputError, match=r"would also adapt `model.layers.1.mlp.down_proj`"):
            placement.export(stack)
    else:
        assert OWN[stack](placement.export(stack), names) == {names[0]: (16, 32)}


class TestTraps:
    """What looks right in a stack's configuration and is not."""

    def test_a_list_of_one_name_is_a_regular_expression_in_trl(self) -> None:
        model = llama()
        keys = yaml.safe_load(CASES["one module"](model).export("trl"))
        assert len(keys["lora_target_modules"]) == 2 and len(set(keys["lora_target_modules"])) == 1

    @pytest.mark.parametrize("stack", ["trl", "ms-swift"])
    def test_a_default_dropout_breaks_parameters(self, stack: str) -> None:
        model = tiny_mixture()
        placement = placed_on(model, lambda name: "experts.down" in name, parameters=True)
        arguments = PEFT[stack](placement.export(stack))
        with pytest.raises(ValueError, match="lora_dropout"):
            get_peft_model(tiny_mixture(), LoraConfig(**{**arguments, "lora_dropout": 0.05}))
        get_peft_model(model, LoraConfig(**arguments))

    def test_a_regular_expression_in_a_list_matches_nothing(self) -> None:
        with pytest.raises(ValueError, match="not found in the base model"):
            get_peft_model(llama(), LoraConfig(target_modules=[r"model\.layers\.1\.self_attn\.v_proj"]))
        entries = yaml.safe_load(CASES["a few"](llama()).export("axolotl"))["lora_target_modules"]
        assert set(entries) <= set(linear_names(llama()))

    @pytest.mark.parametrize(
        ("chosen", "also"),
        [("visual_like.gate", "visual_like.gate_proj"), ("model.l.0.q", "language_model.l.0.q")],
    )
    def test_llama_factory_looks_for_parts_of_names(self, chosen: str, also: str) -> None:
        chosen, also = (name.replace("visual_like", "block") for name in (chosen, also))
        placement = placed_by_name([chosen], [also])
        with pytest.raises(InputError, match=f"would also adapt `{also}`"):
            placement.export("llama-factory")

    def test_llama_factory_passes_over_towers(self) -> None:
        with pytest.raises(InputError, match=r"it has no name for `model.visual.blocks.0.attn.qkv`"):
            placed_by_name(["model.visual.blocks.0.attn.qkv", "model.layers.0.q"], []).export("llama-factory")

    def test_an_entry_of_peft_is_a_suffix(self) -> None:
        with pytest.raises(InputError, match=r"would also adapt `other.layers.0.q`"):
            placed_by_name(["layers.0.q"], ["other.layers.0.q", "other.layers.0.qq"]).export("trl")

    def test_unsloth_adds_no_experts_of_its_own_accord(self) -> None:
        text = CASES["types"](llama()).export("unsloth")
        assert call_in(text, "FastLanguageModel.get_peft_model")["target_parameters"] == []

    def test_unsloth_trains_heads_in_full(self) -> None:
        with pytest.raises(InputError, match=r"it trains `lm_head` in full instead of with LoRA"):
            placed_by_name(["lm_head", "layers.0.q"], []).export("unsloth")

    def test_names_that_are_equal_with_underscores_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"would also adapt `a_b.c`"):
            placed_by_name(["a.b_c"], ["a_b.c"]).export("kohya")

    def test_mlx_has_fewer_layers_than_its_default(self) -> None:
        assert yaml.safe_load(CASES["types"](llama()).export("mlx-lm"))["num_layers"] == -1

    def test_a_part_of_a_fused_weight_in_one_block_does_not_hide_another(self) -> None:
        text = CASES["q everywhere, k once"](llama()).export("megatron-bridge")
        assert all(entry.startswith("*.layers.") for entry in call_in(text, "CanonicalLoRA")["target_modules"])


def placed_by_name(chosen: list[str], others: list[str], **fields: Any) -> Placement:
    targets = tuple(LoraTarget.of_module(name, 32, 32) for name in chosen)
    rest = tuple(LoraTarget.of_module(name, 32, 32) for name in others)
    return Placement(tuple(chosen), ("t",), "types", "by name", "M", targets, left_out=rest, **fields)


def test_numbers_of_the_call_are_those_of_the_export() -> None:
    placement = CASES["types"](llama())
    for stack in PEFT:
        arguments = PEFT[stack](placement.export(stack, r=3, lora_alpha=9))
        assert (arguments["r"], arguments["lora_alpha"]) == (3, 9)
    for stack in OWN:
        if stack != "torchtune":
            assert set(OWN[stack](placement.export(stack, r=3, lora_alpha=9), ["model.layers.0.self_attn.v_proj"]).values()) == {(3, 9)}  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(("alpha", "written"), [(7.5, 8), (0.2, 1)])
def test_an_alpha_that_has_to_be_whole_is_not_rounded_in_silence(alpha: float, written: int) -> None:
    placement = CASES["types"](llama())
    for stack in STACKS:
        whole = exports.stack_named(stack).alphas.whole
        made = exports.plan(placement, stack, lora_alpha=alpha, lossy=True)
        assert made.alpha == (written if whole else alpha)
        assert (f"its alpha is a whole number: {alpha:g} would be rounded" in made.losses) == whole


def test_alphas_of_ranks_have_to_be_whole_for_axolotl() -> None:
    placement = CASES["ranks"](llama())
    assert placement.export("axolotl")
    with pytest.raises(InputError, match=r"its alpha is a whole number: 4.5 would be rounded"):
        placement.export("axolotl", lora_alpha=6)


def test_ranks_that_are_equal_where_a_stack_adapts_are_one_rank() -> None:
    experts = LoraTarget("layers.0.experts.down", True, 96, (2, 32, 16))
    module = LoraTarget.of_module("layers.0.q", 32, 32)
    ranks = {experts.name: 8, module.name: 4}
    placement = Placement(("a",), ("t",), "types", "x", "M", (experts, module), r=8, ranks=ranks)
    made = exports.plan(placement, "llama-factory", lossy=True)
    assert (made.r, made.alpha, made.ranks) == (4, 8, {})
    assert made.losses == ("it adapts no parameters of a module: `layers.0.experts.down` would get no LoRA",)


def test_what_is_lost_is_a_warning_and_a_comment() -> None:
    placement = CASES["ranks"](llama())
    with pytest.warns(UserWarning) as caught:
        text = placement.export("trl", lossy=True)
    line = "it has one rank for all modules: 4 instead of 2 to 4"
    assert [str(item.message) for item in caught] == [line]
    assert f"# Not as placed: {line}\n" in text and yaml.safe_load(text)["lora_r"] == 4


def test_notes_of_the_placement_are_warnings_and_comments() -> None:
    placement = placed_by_name(["a.0.b"], [], notes=("one\nr: 5",))
    for stack in PEFT:
        with pytest.warns(UserWarning, match="one"):
            text = placement.export(stack)
        assert "# Note: one r: 5\n" in text


def test_comments_come_first_and_the_rest_has_the_form_of_the_stack() -> None:
    placement = CASES["attention"](llama())
    for stack in STACKS:
        text = placement.export(stack)
        assert text.startswith("# LoRA placement picked of LlamaForCausalLM, 44 modules, for ") and text.endswith("\n")
        if exports.stack_named(stack).form.startswith("Python"):
            ast.parse(text)


@pytest.mark.parametrize("stack", ["nope", "_plan", "peft.py", ""])
def test_an_unknown_stack_is_named_with_those_there_are(stack: str) -> None:
    with pytest.raises(InputError) as caught:
        CASES["types"](llama()).export(stack)
    assert str(caught.value) == f"`stack` must be one of {', '.join(STACKS)}, got '{stack}'"


def test_a_new_file_is_a_new_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_stack.py").write_text(
        "from plop_ext.placement.exports._stack import Stack\n"
        "STACK = Stack(title='A', release='1', form='words', write=lambda plan: ' '.join(plan.modules))\n"
    )
    (tmp_path / "_shared.py").write_text("")
    monkeypatch.setattr(exports, "__path__", [*exports.__path__, str(tmp_path)])
    assert "a-stack" in exports.stacks() and "-shared" not in exports.stacks()
    placement = placed_by_name(["a.0.b"], [])
    assert placement.export("a-stack") == "# LoRA placement by name of M, 1 module, for A 1.\na.0.b"


def test_names_with_marks_of_each_form_are_kept() -> None:
    name = 'a.0."b"\\:#{x}'
    placement = placed_by_name([name], [])
    for stack in sorted({*PEFT} - {"diffusers", "llama-factory"}):
        assert set(PEFT[stack](placement.export(stack))["target_modules"]) == {name}
    for stack in ("mlx-lm", "musubi", "prime-rl"):
        assert set(OWN[stack](placement.export(stack), [name])) == {name}
    for stack, other in (("llama-factory", "a,b"), ("diffusers", "a,b"), ("lycoris", "a[b]"), ("kohya", "a=b")):
        with pytest.raises(InputError, match="has no name for"):
            placed_by_name([other], []).export(stack)


def test_any_part_of_a_name_is_found() -> None:
    names = ["a.b.cd", "b.c", "a.b", "xy", "wxyz", "b.d.c"]
    assert by_substring({"b.c", "xyz"}, names) == ["a.b.cd", "b.c", "wxyz"]


def test_a_placement_knows_what_it_left_out() -> None:
    found = scores(table([0.5, 0.8, 1.2]))
    placement = found.place(types=1)
    names = {target.name for target in placement.lora_targets}
    rest = {target.name for target in placement.left_out}
    assert names | rest == {module.target.name for module in found.modules} and not names & rest


def test_a_stack_that_is_described_only_takes_a_whole_alpha() -> None:
    plain = Stack(title="A", release="1", form="words", write=lambda plan: "")
    assert plain.peft and plain.alphas.whole and not (plain.ranks or plain.parameters or plain.alphas.per_module)
