"""The entropy term in the real loss: absent unless asked for, the gradient of entropy where it is, refused twice."""

from __future__ import annotations

import pytest
import torch
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.monitors.entropy_control import EntropySettings, controlled
from polyphony.curricula.records import Domain
from polyphony.launch.build import build_scheduler
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.trainer.entropy import ROW_COEFFICIENT, DomainEntropy
from polyphony.trainer.settings import TrainerSettings
from tests.conftest import RECIPES
from tests.test_entropy import group

ADAPTIVE = EntropySettings(control="adaptive")


@pytest.mark.parametrize("override", ["grpo.entropy_coef=0.01", "grpo.use_adaptive_entropy=true"])
def test_two_controllers_of_entropy_are_refused_in_one_line(override):
    with pytest.raises(RecipeError, match=r"entropy.control and \w+=\S+ exclude each other"):
        load_recipe(RECIPES / "debug.yaml", ["entropy.control={stories: coefficient}", override])


def test_the_python_interface_refuses_them_too(tmp_path):
    arguments = GRPOConfig(output_dir=str(tmp_path), bf16=False, entropy_coef=0.01)
    settings = TrainerSettings.of(entropy=ADAPTIVE, max_grader_failures=0.5)
    with pytest.raises(ValueError, match=r"entropy_coef=0\.01 exclude each other"):
        settings.check(
            [Domain(name="math", kind="structured")], engine="vllm", of_trl=lambda name: getattr(arguments, name)
        )


@pytest.mark.parametrize("band", ["[0.5, 0.9]", "[0.5]", "wide"])
def test_a_band_without_the_base_model_is_a_recipe_error(band):
    with pytest.raises(RecipeError, match=r"^entropy\.band"):
        load_recipe(RECIPES / "debug.yaml", [f"entropy.band={band}"])


@pytest.mark.parametrize("control", ["none", "sampling"])
def test_trls_own_options_stay_where_no_coefficient_was_asked_for(control):
    overrides = [f"entropy.control={control}", "grpo.entropy_coef=0.01", "grpo.epsilon_high=0.28"]
    assert load_recipe(RECIPES / "debug.yaml", overrides).grpo["entropy_coef"] == 0.01


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("often", r"^entropy\.control: .*expected none, adaptive, coefficient or sampling"),
        ("{stories: often}", r"^entropy\.control: .*expected none, adaptive, coefficient or sampling"),
        ("{stores: adaptive}", r"^unknown domain 'entropy\.control\.stores'; did you mean 'stories'"),
    ],
)
def test_a_control_that_does_not_exist_is_a_recipe_error(control, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPES / "debug.yaml", [f"entropy.control={control}"])


@pytest.mark.parametrize(
    ("control", "coefficients", "shares"),
    [
        ("none", (), ()),
        ("adaptive", ("math", "stories"), ("math", "stories")),
        ("coefficient", ("math", "stories"), ()),
        ("sampling", (), ("math", "stories")),
        ({"math": "adaptive", "stories": "sampling"}, ("math",), ("math", "stories")),
        ({"stories": "coefficient"}, ("stories",), ()),
    ],
)
def test_either_means_can_be_asked_for_alone_and_for_one_domain(control, coefficients, shares):
    domains = ("math", "stories")
    assert controlled(control, "coefficient", domains) == coefficients
    assert controlled(control, "sampling", domains) == shares


@pytest.mark.parametrize("scheduler", ["adaptive", "auto", "polyphony.curricula.schedulers.adaptive:Adaptive"])
def test_the_recipe_tells_the_scheduler_whose_entropy_moves_the_shares(scheduler):
    def built(*overrides):
        found = build_scheduler(load_recipe(RECIPES / "debug.yaml", [f"curriculum.scheduler={scheduler}", *overrides]))
        return getattr(found, "inner", found)

    assert built().entropy_control == ()
    assert built("entropy.control={safety: sampling, stories: coefficient}").entropy_control == ("safety",)
    assert built("entropy.control=adaptive", "entropy.band=[0.6, 2]").entropy_band == (0.6, 2.0)


def test_sampling_under_a_scheduler_that_cannot_is_a_recipe_error():
    with pytest.raises(RecipeError, match=r"scheduler 'joint' does not support `entropy\.control: sampling`"):
        build_scheduler(load_recipe(RECIPES / "debug.yaml", ["curriculum.scheduler=joint", "entropy.control=sampling"]))
    build_scheduler(load_recipe(RECIPES / "debug.yaml", ["curriculum.scheduler=joint", "entropy.control=adaptive"]))


def test_the_term_is_the_coefficients_times_the_masked_entropies_over_all_tokens():
    watch = DomainEntropy(("math", "stories"), ADAPTIVE)
    entropy = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    # (.1 (1 + 2) - .2 * 3) / 3 tokens
    assert watch.bonus(entropy, mask, torch.tensor([0.1, -0.2])).item() == pytest.approx(-0.1)


def test_a_domain_that_is_not_held_has_no_coefficient():
    watch = DomainEntropy(("math", "stories"), EntropySettings(control={"stories": "coefficient"}))
    watch.after_evaluation(0, {name: [(10.0, 10)] for name in watch.domains})
    groups = [group(0.0, 0.0), group(0.5, 0.0, domain="stories"), group(1.0, 0.0, domain="stories")]
    watch.after_draw(1, {"math": (1.0, 10.0), "stories": (4.0, 10.0)}, groups)
    # the band is [.5, 1.5], drawn in to [.65, 1.35]; e = .25, push 1, rate .02
    assert watch.metrics()["domain/stories/entropy_coef"] == pytest.approx(0.255)
    assert "domain/math/entropy_coef" not in watch.metrics()
    assert watch.rows(groups, torch.device("cpu"))[ROW_COEFFICIENT].tolist() == pytest.approx([0.0, 0.255, 0.0])


def test_where_only_replaced_groups_had_nothing_right_there_is_nothing_to_act_on():
    watch = DomainEntropy(("math",), ADAPTIVE)
    watch.after_evaluation(0, {"math": [(10.0, 10)]})
    watch.after_draw(1, {"math": (1.0, 10.0)}, [group(1.0, 0.0)], discarded=[group(0.0, 0.0)])
    assert watch.metrics()["domain/math/entropy_coef"] == 0.0


@pytest.mark.parametrize("control", ["none", "sampling"])
def test_rows_carry_a_coefficient_only_where_it_was_asked_for(control):
    watch = DomainEntropy(("math",), EntropySettings(control=control))
    assert watch.control is None and watch.rows([group(0.0)] * 2, torch.device("cpu")) == {}
    rows = DomainEntropy(("math",), ADAPTIVE).rows([group(0.0)] * 2, torch.device("cpu"))
    assert rows[ROW_COEFFICIENT].tolist() == [0, 0]


@pytest.mark.parametrize("rows", ["some", "true"])
def test_rows_that_do_not_exist_are_a_recipe_error(rows):
    with pytest.raises(RecipeError, match=r"^entropy\.rows: .*'unsolved' or 'all'"):
        load_recipe(RECIPES / "debug.yaml", [f"entropy.rows={rows}"])


@pytest.fixture(scope="module")
def captured(tmp_path_factory, engine):
    """Gradients of one micro-batch of a real trainer: TRL's own, and ours with control on and each coefficient set."""
    from polyphony.launch.build import build_trainer

    overrides = ["entropy.control=adaptive", "entropy.rows=all", "tracking.wandb=null"]
    recipe = load_recipe(RECIPES / "debug.yaml", overrides)
    trainer = build_trainer(recipe, tmp_path_factory.mktemp("control"), engine=engine)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    trainer.entropy.control.coefficients["arithmetic"] = 1.0
    inputs = trainer._prepare_inputs([{"prompt": ""}] * 32)
    return trainer, inputs


def gradient(trainer, inputs, loss) -> torch.Tensor:
    trainer.model.zero_grad()
    loss(trainer.model, inputs).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).clone()


@pytest.mark.slow
def test_with_coefficients_of_zero_or_control_off_the_gradient_is_trls_bit_for_bit(captured):
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer, inputs = captured
    stock = gradient(trainer, inputs, lambda *a: GRPOTrainer._compute_loss(trainer, *a))
    zero = {**inputs, ROW_COEFFICIENT: torch.zeros_like(inputs[ROW_COEFFICIENT])}
    assert torch.equal(stock, gradient(trainer, zero, trainer._compute_loss))
    control, trainer.entropy.control = trainer.entropy.control, None
    off = gradient(trainer, inputs, trainer._compute_loss)
    trainer.entropy.control = control
    assert torch.equal(stock, off) and stock.abs().sum() > 0


@pytest.mark.slow
def test_equal_coefficients_are_trls_own_bonus(captured):
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer, inputs = captured
    inputs = {**inputs, ROW_COEFFICIENT: torch.full_like(inputs["advantages"], 0.05)}
    ours = gradient(trainer, inputs, trainer._compute_loss)
    trainer._entropy_bonus_enabled, trainer.entropy_coef = True, 0.05
    trls = gradient(trainer, inputs, lambda *a: GRPOTrainer._compute_loss(trainer, *a))
    trainer._entropy_bonus_enabled, trainer.entropy_coef = False, 0.0
    plain = gradient(trainer, inputs, lambda *a: GRPOTrainer._compute_loss(trainer, *a))
    assert torch.allclose(ours, trls, atol=1e-7) and not torch.allclose(ours, plain, atol=1e-5)


@pytest.mark.slow
def test_one_domains_coefficient_raises_that_domains_entropy(captured):
    trainer, inputs = captured
    is_own = (inputs[ROW_COEFFICIENT] == 1.0).unsqueeze(1)  # as TRL has shuffled and split it
    assert 0 < is_own.sum() < len(is_own)

    def entropy_of(rows):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with torch.no_grad():
            _, entropy, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, attention, inputs["completion_ids"].size(1), compute_entropy=True
            )
        mask = inputs["completion_mask"] * rows
        return ((entropy * mask).sum() / mask.sum()).item()

    before = entropy_of(is_own)
    inputs = {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
    gradient(trainer, inputs, trainer._compute_loss)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    with torch.no_grad():
        for p in trainer.model.parameters():
            p -= 0.1 * p.grad
    after = entropy_of(is_own)
    with torch.no_grad():
        for p, w in zip(trainer.model.parameters(), weights, strict=True):
            p.copy_(w)
    assert after > before + 1e-3
