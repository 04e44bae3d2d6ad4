"""Roles of networks that no table was written for."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import compat
from qsr_plugin.quant import places
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.generic_roles import GENERIC_ROLES, generic_roles
from qsr_plugin.quant.layer_trace import LayerTraceError
from qsr_plugin.quant.places import ROLE_TABLES, Index, roles_of
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers, tap
from tests.quant.toy_networks import Deconvolution, MultiDistillation, ShuffleEnd, Transformer, UNet, conv

compat.import_host()


def layers_of(net: nn.Module) -> set[str]:
    return {name for name, one in net.named_modules() if isinstance(one, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))}


def check_disjoint(net: nn.Module, roles, without: set[str] = frozenset()) -> None:
    """Every layer has one role, those in ``without`` none."""
    found = [name for role in ("head", "block.conv", "upsampler", "tail") for name in roles[role]]
    assert len(found) == len(set(found)) and set(found) == layers_of(net) - without
    assert set(roles) == set(GENERIC_ROLES) and roles["body_end"] == ()


def test_one_convolution_before_a_shuffle_is_the_tail() -> None:
    net = ShuffleEnd()
    roles = generic_roles(net)
    check_disjoint(net, roles)
    assert (roles["head"], roles["upsampler"], roles["tail"]) == (("enter",), (), ("upsampler.0",))
    assert roles["block"] == ("block_1", "block_2")
    assert roles["features"] == ("upsampler.0:input",)
    assert roles["block.conv"][:4] == ("block_1.first", "block_1.second", "block_1.mix", "block_1.attention.shrink")
    assert roles["block.conv"][-1] == "after"


def test_repeated_images_channel_attention_and_fusion() -> None:
    net = MultiDistillation()
    roles = generic_roles(net)
    check_disjoint(net, roles)
    assert roles["head"] == ("enter",)
    assert roles["block"] == ("b1", "b2", "b3")
    assert roles["tail"] == ("last.0",)
    assert {"b1.down", "b1.join", "fuse", "after"} <= set(roles["block.conv"])


def test_transformers_with_a_size_of_their_own() -> None:
    net = Transformer()
    roles = generic_roles(net)
    check_disjoint(net, roles, without={f"layers.{index}.bias" for index in range(3)})  # they see no image
    assert roles["block"] == ("layers.0", "layers.1", "layers.2")
    assert (roles["upsampler"], roles["tail"]) == (("upsample.0",), ("last",))
    assert roles["block.conv"][:4] == ("layers.0.qkv", "layers.0.proj", "layers.0.fc1", "layers.0.fc2")
    assert roles["block.conv"][-2:] == ("after", "before")


def test_resolutions_that_go_down_and_up_in_the_body() -> None:
    net = UNet()
    roles = generic_roles(net)
    check_disjoint(net, roles)
    assert roles["block"] == ("high.0", "high.1", "low.0", "low.1")
    assert {"down", "up"} <= set(roles["block.conv"])
    assert (roles["upsampler"], roles["tail"]) == (("enlarge_1",), ("enlarge_2", "last"))
    assert roles["features"] == ("enlarge_1:input",)


def test_grey_images_and_a_transposed_convolution() -> None:
    roles = generic_roles(Deconvolution())
    assert roles["head"] == ("layers.0",) and roles["tail"] == ("deconv",) and roles["upsampler"] == ()
    assert roles["block.conv"] == ("layers.2", "layers.3", "layers.4")
    assert roles["block"] == ("layers.4",)  # no module holds only these: the last one stands for them


def test_small_networks_have_only_the_roles_they_have_layers_for() -> None:
    assert generic_roles(nn.Sequential(nn.PixelShuffle(1))) == {}
    one = generic_roles(nn.Sequential(conv(3, 12), nn.PixelShuffle(2)))
    assert one == {"head": ("0",), "upsampler": (), "tail": (), "body_end": ()}
    two = generic_roles(nn.Sequential(conv(3, 8), conv(8, 3)))
    assert two["tail"] == ("1",) and two["features"] == ("1:input",) and not {"block", "block.conv"} & set(two)


def test_images_enlarged_before_the_network_have_no_upsampler() -> None:
    net = nn.Sequential(nn.Upsample(scale_factor=2), conv(3, 8), conv(8, 8), conv(8, 3))
    roles = generic_roles(net)
    assert (roles["head"], roles["block.conv"], roles["upsampler"], roles["tail"]) == (("1",), ("2",), (), ("3",))


def test_mean_shifts_stored_as_convolutions_have_no_role() -> None:
    net = nn.Sequential(
        conv(3, 3, 1), conv(3, 8), conv(8, 8), conv(8, 32), nn.PixelShuffle(2), conv(8, 3), conv(3, 3, 1)
    )
    roles = generic_roles(net)
    assert (roles["head"], roles["block.conv"], roles["upsampler"], roles["tail"]) == (("1",), ("2",), ("3",), ("5",))


def test_branches_side_by_side_are_no_chain_of_blocks() -> None:
    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.last = conv(3, 8), conv(8, 3)
            self.left, self.right = (nn.Sequential(conv(8, 8), nn.ReLU()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            return self.last(self.left(x) + self.right(x))

    assert set(generic_roles(Sides())["block"]) == {"left", "right"}  # modules that keep the shape, not a chain


@pytest.mark.parametrize("backbone", ["EDSR", "MSRResNet", "SRResNet"])
@pytest.mark.parametrize("upscale", [2, 4])
def test_structure_agrees_with_the_role_tables(tiny_net, backbone: str, upscale: int) -> None:
    net = tiny_net(backbone, upscale=upscale)
    index, table, found = Index.of(net), roles_of(net), generic_roles(net)
    assert "block.conv_first" in table, "the role table, not what the structure shows"

    def named(role: str) -> set[str]:
        return {name for pattern in table[role] for name, _ in index.matching(pattern, None)}

    for role in ("head", "tail", "block"):
        assert set(found[role]) == named(role)
    assert set(found["block.conv"]) == named("block.conv") | named("body_end")
    assert set(found["upsampler"]) == named("upsampler")


# -- in use ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def crops() -> list[Tensor]:
    return [torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))]


@pytest.mark.parametrize("make", [ShuffleEnd, MultiDistillation, Transformer, UNet])
@pytest.mark.parametrize("placement", ["body", "full"])
def test_recipes_work_without_a_role_table(make: type[nn.Module], placement: str, crops: list[Tensor]) -> None:
    torch.manual_seed(0)
    net = make().eval()
    roles, want = generic_roles(net), net(crops[0])
    quantized = calibrate(quantize_model(net, load_recipe("minmax", placement=placement)), crops)
    chosen = {place.rpartition(".")[0] for place, _ in quantizers(quantized)}
    everything = [name for role in ("head", "block.conv", "upsampler", "tail") for name in roles[role]]
    assert chosen == set(roles["block.conv"] if placement == "body" else everything)
    assert 0 < (quantized(crops[0]) - want).abs().max() < 0.1 * want.abs().max()  # 8 bits


def test_quantized_networks_and_their_copies_know_their_roles(crops: list[Tensor], monkeypatch) -> None:
    net = quantize_model(ShuffleEnd().eval(), load_recipe("minmax", placement="body"))
    want = generic_roles(ShuffleEnd())
    monkeypatch.setattr(places, "generic_roles", lambda net: pytest.fail("asked for again"))
    copy = calibrate(tap(deepcopy(net), "block:output", "b"), crops)
    assert roles_of(net) == roles_of(copy) == want
    copy(crops[0])
    assert [tensor.shape for tensor in copy.last_record().tapped("b")] == [(2, 8, 32, 32)] * 2


def test_a_network_quantized_by_names_is_looked_at_when_a_role_is_asked(crops: list[Tensor]) -> None:
    rules = [{"match": "after", "port": "input"}]
    net = quantize_model(ShuffleEnd().eval(), load_recipe("minmax", placement="mine", placements={"mine": rules}))
    assert "found_roles" not in vars(net)
    calibrate(net, crops)
    before = deepcopy(net.state_dict())
    tap(net, "features", "f")
    assert roles_of(net) == generic_roles(ShuffleEnd())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net(crops[0])
    assert net.last_record().taps["f"].shape == (2, 8, 32, 32)


def test_roles_are_found_again_after_layers_changed_their_names() -> None:
    net = ShuffleEnd()
    assert "after" in roles_of(net)["block.conv"]
    net.renamed = net.after
    net.after = nn.Identity()
    net.block_2 = nn.Sequential(net.block_2, net.renamed)
    assert roles_of(net)["block.conv"][-1] == "block_2.1"


def test_placements_that_ask_for_more_say_which_do_not() -> None:
    message = r"ShuffleEnd has no role 'block\.conv_\w+'.* To go on, take a placement .*\(body\), or write rules"
    with pytest.raises(RecipeError, match=message):
        quantize_model(ShuffleEnd(), "pams")
    with pytest.raises(RecipeError, match="cannot tap 'block.conv_last:output' of ShuffleEnd.*Near: block.conv"):
        tap(ShuffleEnd(), "block.conv_last:output", "f")


def test_names_of_modules_need_no_run() -> None:
    class Refusing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("takes no image")

    net = tap(Refusing(conv(3, 3)), "0:output", "f")
    rules = [{"match": "0", "port": "input"}]
    quantize_model(Refusing(conv(3, 3)), load_recipe("minmax", placement="mine", placements={"mine": rules}))
    with pytest.raises(LayerTraceError, match="Refusing takes no small test image"):
        tap(net, "features", "g")


def test_a_type_chooses_among_the_modules_of_a_role(monkeypatch) -> None:
    monkeypatch.setitem(ROLE_TABLES, "ShuffleEnd", {"upsampler": ("upsampler.1", "upsampler.0")})
    rules = [{"role": "upsampler", "type": "Conv2d", "port": "input"}]
    net = quantize_model(ShuffleEnd(), load_recipe("minmax", placement="mine", placements={"mine": rules}))
    assert [place for place, _ in quantizers(net)] == ["upsampler.0.input"]
    rules[0]["type"] = "Linear"
    with pytest.raises(RecipeError, match=r"'upsampler\.1' of type Linear matches no module"):
        quantize_model(ShuffleEnd(), load_recipe("minmax", placement="mine", placements={"mine": rules}))


def test_a_separable_convolution_on_the_image_is_head_as_a_whole() -> None:
    class Separable(nn.Sequential):
        def __init__(self, before: int, after: int) -> None:
            super().__init__(nn.Conv2d(before, after, 1), nn.Conv2d(after, after, 3, padding=1, groups=after))

    net = nn.Sequential(Separable(3, 8), Separable(8, 8), Separable(8, 8), nn.Conv2d(8, 12, 1), nn.PixelShuffle(2))
    roles = generic_roles(net)
    assert roles["head"] == ("0.0", "0.1") and roles["tail"] == ("3",)
    assert roles["block.conv"] == ("1.0", "1.1", "2.0", "2.1")
