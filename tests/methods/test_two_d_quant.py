"""Searched and distilled bounds: published gradients and steps, and the search on a histogram against an exact one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_plugin import compat
from qsr_plugin.methods.two_d_quant import BoundSearchObserver, SearchedBoundsQuantizer, candidate, search_bounds
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.observers import minmax
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.quant.builders import observed

compat.import_host()


def quantizer(bits: int, role: str = "act", **options: object) -> SearchedBoundsQuantizer:
    return SearchedBoundsQuantizer(SearchedBoundsQuantizer.Options(**options), (bits,), role, 1 if role == "act" else 0)


@pytest.mark.parametrize("role", ["act", "weight"])
def test_published_gradients(role: str) -> None:
    q = quantizer(2, role)
    with torch.no_grad():
        q.set_range(torch.tensor(2.0), torch.tensor(4.0))
    q.mark_calibrated()
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    out = q(x)
    assert torch.allclose(out, torch.tensor([2, 2, 3.333333, 4, 4]))
    dx, dl, du = torch.autograd.grad(out.sum(), (x, q.lower, q.upper))
    assert dx.tolist() == [0, 1, 1, 1, 0]
    assert (dl.item(), du.item()) == pytest.approx((-1 / 6 + 2, 1 / 6 + 2), abs=1e-6)


def test_zeros_behind_a_relu_pull_at_the_lower_bound() -> None:
    """They lie exactly on it, and count for it, unlike with a clamp."""
    q = observed(quantizer(4), torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0]))
    assert q.lower == 0
    (dl,) = torch.autograd.grad(q(torch.zeros(7)).sum(), q.lower)
    assert dl.item() == 7


def test_steps_of_the_search() -> None:
    low, high = torch.tensor(-2.0), torch.tensor(6.0)
    assert [end.item() for end in candidate(low, high, 10, 100, one_sided=False)] == pytest.approx([-1.6, 5.6])
    assert [end.item() for end in candidate(low, high, 10, 100, one_sided=True)] == pytest.approx([-2.0, 5.2])
    assert candidate(low, high, 0, 100, one_sided=False) == (low, high)


def exhaustive(x: Tensor, bits: int, one_sided: bool) -> list[float]:
    """Norm of the error of every one of 100 pairs of bounds, on the tensor itself."""
    errors = []
    for index in range(100):
        step = (x.max() - x.min()) / (100 if one_sided else 200)
        low, high = x.min() + (0 if one_sided else index * step), x.max() - index * step
        s = (high - low) / (2**bits - 1)
        errors.append((((x.clamp(low, high) - low) / s).round() * s + low - x).norm().item())
    return errors


def tensors() -> dict[str, Tensor]:
    """Shapes of distributions as they come in networks."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(60000, generator=generator)
    heavy = normal.sinh().pow(3)
    return {
        "normal": normal,
        "heavy tails": heavy,
        "relu": normal.relu(),
        "relu, heavy": heavy.relu(),
        "gelu": F.gelu(2 * normal),
        "softmax": (3 * normal).view(-1, 60).softmax(1).flatten(),
        "lopsided": torch.where(normal > 0, 4 * normal.square(), normal),
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", tensors())
def test_search_on_the_histogram_is_as_good_as_on_the_tensors(kind: str, bits: int) -> None:
    x = tensors()[kind]
    for one_sided, search in ((False, "both"), (True, "upper")):
        errors = exhaustive(x, bits, one_sided)
        q = observed(quantizer(bits, search=search), *x.split(16000))
        assert (q(x) - x).norm().item() <= 1.005 * min(errors)
        exact = observed(quantizer(bits, "weight", search=search), x)
        assert (exact(x) - x).norm().item() <= (1 + 1e-5) * min(errors)


def test_first_of_equal_candidates_wins() -> None:
    """The lower end, which stays, is where all values are: no pair loses anything, and the widest is taken."""
    x = torch.tensor([0.0, 0.0])
    ends = search_bounds(x, None, 2, 100, ends=(torch.tensor(0.0), torch.tensor(3.0)), one_sided=True)
    assert ends == (torch.tensor(0.0), torch.tensor(3.0))


@pytest.mark.parametrize(
    ("kind", "one_sided"),
    [("normal", False), ("heavy tails", False), ("relu", True), ("gelu", True), ("softmax", True)],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_which_ends_move_is_decided_by_how_far_a_tensor_reaches_below_zero(kind, one_sided, scale: float) -> None:
    x = tensors()[kind] * scale
    q = observed(quantizer(2), x)
    low, high = minmax(x)
    assert torch.equal(q.lower, low) is one_sided and q.upper < high


def test_weights_have_bounds_of_their_own_on_both_sides() -> None:
    w = torch.cat([torch.linspace(-0.2, 0.1, 50), torch.tensor([0.9])])
    q = observed(quantizer(3, "weight"), w)
    low, high, errors = q.lower.item(), q.upper.item(), exhaustive(w, 3, False)
    best = errors.index(min(errors))
    assert (low, high) == pytest.approx((-0.2 + 0.0055 * best, 0.9 - 0.0055 * best), abs=1e-6)
    assert q.qparams().qmax == 7 and len(q.range_parameters()) == 2


@pytest.mark.parametrize(("batch", "message"), [([float("inf")], "non-finite"), ([], "empty")])
@pytest.mark.parametrize("bins", [0, 8])
def test_unusable_tensors_are_refused(batch: list, message: str, bins: int) -> None:
    with pytest.raises(ValueError, match=message):
        BoundSearchObserver(4, 10, "auto", bins).update(torch.tensor(batch))
    with pytest.raises(RuntimeError, match="nothing was observed"):
        BoundSearchObserver(4, 10, "auto", bins).range()


class Tokens(nn.Module):
    """A convolution, two linear layers on tokens, and back to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.fc1, self.fc2 = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.head(x).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(self.fc1(tokens))).transpose(1, 2).reshape(x.shape)


def test_linear_layers_of_any_network_are_a_placement(tiny_net, images) -> None:
    net = calibrate(quantize_model(Tokens(), load_recipe("2dquant", placement="linears")), images)
    assert [place for place, _ in quantizers(net)] == ["fc1.input", "fc1.weight", "fc2.input", "fc2.weight"]
    assert bool(torch.isfinite(net(images[0])).all())
    with pytest.raises(RecipeError, match="of type Linear matches no module"):
        quantize_model(tiny_net(), load_recipe("2dquant", placement="linears"))
