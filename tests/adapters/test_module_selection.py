"""What a config means by names, regexes and layers; whatever matches nothing is an error."""

import pytest

from llmtune.adapters.lora import LoraAdapter
from llmtune.adapters.module_selection import ModuleNames, choose_targets, shorten_targets
from llmtune.errors import LlmtuneError

LAYERS = range(4)
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.v_proj": (32, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}


def names(*, tied: bool = True, experts: bool = False) -> ModuleNames:
    return ModuleNames(
        linear={f"model.layers.{n}.{name}": SHAPES[name] for n in LAYERS for name in SHAPES},
        experts=(
            {f"model.layers.{n}.mlp.experts.gate_up_proj": (4, 128, 64) for n in LAYERS}
            if experts
            else {}
        ),
        head="lm_head",
        is_head_tied=tied,
        others={"model.embed_tokens": "Embedding", "model.norm": "LlamaRMSNorm"},
    )


def choose(**knobs) -> list[str]:
    return choose_targets(LoraAdapter(**knobs), names())


def problem(**knobs) -> str:
    with pytest.raises(LlmtuneError) as caught:
        choose_targets(LoraAdapter(**knobs), names())
    return str(caught.value)


def test_all_linear_is_every_linear_layer_but_the_head():
    assert choose() == list(names().linear)


def test_names_match_whole_parts_of_a_name():
    assert len(choose(target_modules=["q_proj"])) == 4
    assert choose(target_modules=["layers.2.mlp.up_proj"]) == ["model.layers.2.mlp.up_proj"]
    assert "matches no linear layer" in problem(target_modules=["proj"])


def test_string_is_a_regex_over_whole_names():
    assert len(choose(target_modules=r".*\.(q|v)_proj")) == 8
    assert "for names write a list: [q_proj]" in problem(target_modules="q_proj")
    assert "is not a regex" in problem(target_modules="(q_proj")


def test_each_misspelt_name_is_reported_with_the_nearest():
    message = problem(target_modules=["q_proj", "v_prj", "up_poj"])

    assert "'v_prj' matches no linear layer; did you mean v_proj" in message
    assert "'up_poj' matches no linear layer; did you mean up_proj" in message
    assert "'q_proj'" not in message


def test_name_without_a_near_one_lists_what_there_is():
    assert "there are: q_proj, v_proj, up_proj, down_proj" in problem(target_modules=["xyz"])


def test_last_layers_and_lists_of_layers():
    assert {name.split(".")[2] for name in choose(layers="last-2")} == {"2", "3"}
    assert {name.split(".")[2] for name in choose(layers=[0, 3])} == {"0", "3"}


@pytest.mark.parametrize("layers", ["last-5", [4], [0, 7], [-1], []])
def test_layer_that_is_not_there_is_an_error(layers):
    assert "adapter.layers" in problem(layers=layers)


def test_name_outside_the_chosen_layers_is_an_error():
    message = problem(target_modules=["layers.0.mlp.up_proj", "q_proj"], layers="last-1")

    assert "'layers.0.mlp.up_proj' is in none of the chosen layers" in message


def test_every_pattern_must_match_an_adapted_module():
    message = problem(target_modules=["q_proj"], rank_pattern={"up_proj": 8, "q_proj": 4})

    assert "adapter.rank_pattern: 'up_proj' matches no adapted module" in message
    assert "'q_proj' matches" not in message
    assert "adapter.alpha_pattern: 'q_porj'" in problem(alpha_pattern={"q_porj": 8})
    assert "is not a regex" in problem(rank_pattern={"(": 8})


def test_module_to_save_must_exist():
    assert "did you mean embed_tokens" in problem(modules_to_save=["embed_token"])
    assert choose(modules_to_save=["lm_head", "norm"])


def test_all_problems_are_reported_at_once():
    message = problem(
        target_modules=["q_proj", "nope"],
        layers=[9],
        rank_pattern={"zzz": 1},
        modules_to_save=["y"],
    )

    assert len(message.splitlines()) >= 3


@pytest.mark.parametrize("target", [["lm_head"], ".*head", [".*", "lm_head"]])
def test_tied_head_is_refused_by_name(target):
    assert "'lm_head' is the LM head, and its weight is the input embedding too" in problem(
        target_modules=target
    )


def test_untied_head_is_refused_with_a_way_to_train_it():
    with pytest.raises(LlmtuneError, match=r"modules_to_save=\[lm_head\]"):
        choose_targets(LoraAdapter(target_modules=["lm_head"]), names(tied=False))


def test_module_that_is_not_linear_says_what_it_is():
    assert "'embed_tokens' is Embedding; only linear layers" in problem(
        target_modules=["embed_tokens"]
    )


def test_experts_belong_to_all_linear_and_have_a_name():
    offered = names(experts=True)

    assert set(choose_targets(LoraAdapter(), offered)) == set(offered.adaptable)
    chosen = choose_targets(LoraAdapter(target_modules=["q_proj", "experts"]), offered)
    assert [name for name in chosen if "experts" in name] == list(offered.experts)
    assert len(chosen) == 8


def test_experts_cannot_have_dropout():
    offered = names(experts=True)

    assert choose_targets(LoraAdapter(dropout=0.1), offered) == list(offered.linear)
    with pytest.raises(LlmtuneError, match="cannot have dropout"):
        choose_targets(LoraAdapter(dropout=0.1, target_modules=["experts"]), offered)


def test_targets_are_shortened_only_where_that_means_the_same():
    linear = list(names().linear)

    assert shorten_targets(linear, linear) == ["down_proj", "q_proj", "up_proj", "v_proj"]
    assert shorten_targets(linear[:5], linear) == sorted(linear[:5])
    assert shorten_targets(["a.0.gate"], ["a.0.gate", "b.gate"]) == ["a.0.gate"]


def test_a_rank_that_no_layer_can_use_is_refused_and_a_full_one_is_not():
    assert choose(rank=64)
    assert "rank 65 is more than any layer that it is for can use" in problem(rank=65)
    assert "which is at most 32" in problem(rank_pattern={"v_proj": 33})


@pytest.mark.parametrize(
    ("init", "most"),
    [("corda_kpm", 32), ("pissa", 32), ("pissa_niter_4", 32), ("olora", 32), ("eva", 64)],
)
def test_a_start_has_no_more_directions_than_the_layer(init, most):
    shapes = {"0.q_proj": (128, 128), "0.k_proj": (32, 64), "0.v_proj": (32, 64)}
    [said] = LoraAdapter(init=init, rank=most + 1).why_not_shapes(shapes)
    assert f"at most {most} directions in 0.k_proj, and its rank is {most + 1}" in said
    assert f"rank_pattern={{k_proj: {most}, v_proj: {most}}}" in said
    assert LoraAdapter(init=init, rank=most).why_not_shapes(shapes) == []
    assert LoraAdapter(rank=most + 1).why_not_shapes(shapes) == []
