"""Published HAT checkpoints load strictly and compute what the published code computes.

`golden/hat.safetensors` holds outputs of the published code on random weights (`record_hat_golden.py`).
The tests contain none of that code: they build checkpoints from the published names and shapes and from a recipe for
values, which `record_hat_golden.py` also uses.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import savl
from savl.weights.hat import hat_config, published_overlap_index, reorder_overlap_table
from savl.weights.state_dicts import is_hat

GOLDEN = Path(__file__).parent / "golden" / "hat.safetensors"
TOLERANCE = 1e-4  # of outputs with a standard deviation near 1; float32 rounding alone differs by up to 1e-5


# The published architecture: facts about its checkpoints


@dataclass(frozen=True)
class Architecture:
    """Settings that differ between the published option files; overlap 0.5, mlp ratio 2 and 64 features are common."""

    channels: int
    groups: int
    blocks: int
    heads: int
    compress: int
    squeeze: int
    scale: int = 4
    window: int = 16

    @property
    def key_window(self) -> int:
        return self.window * 3 // 2


HAT_S = Architecture(channels=144, groups=6, blocks=6, heads=6, compress=24, squeeze=24)
HAT = Architecture(channels=180, groups=6, blocks=6, heads=6, compress=3, squeeze=30)  # Real_HAT_GAN too
HAT_L = replace(HAT, groups=12)
SMALL = Architecture(channels=24, groups=2, blocks=2, heads=3, compress=4, squeeze=6)

ARCHITECTURES = {
    "small-x2": replace(SMALL, scale=2),
    "small-x3": replace(SMALL, scale=3),
    "small-x4": SMALL,
    "small-w8-x2": replace(SMALL, scale=2, window=8),
    "hat-s-x4": HAT_S,
    "hat-x4": HAT,
}
CASES = {  # heights and widths in LR pixels
    "small-x2": ["1x1", "1x9", "5x7", "16x16", "9x20", "35x16", "35x37"],
    "small-x3": ["7x5", "18x20"],
    "small-x4": ["6x7", "17x20"],
    "small-w8-x2": ["20x13"],
    "hat-s-x4": ["6x17"],  # head dimension 24
    "hat-x4": ["17x6"],  # head dimension 30
}


def published_shapes(hat: Architecture) -> dict[str, tuple[int, ...]]:
    """Return name → shape of every tensor in a published checkpoint, the two index buffers first."""
    channels, window, key_window = hat.channels, hat.window, hat.key_window
    compressed, squeezed = channels // hat.compress, channels // hat.squeeze
    shapes: dict[str, tuple[int, ...]] = {
        "relative_position_index_SA": (window**2, window**2),
        "relative_position_index_OCA": (window**2, key_window**2),
    }

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    layer("conv_first", channels, 3, 3, 3)
    layer("patch_embed.norm", channels)
    for group in range(hat.groups):
        for block in range(hat.blocks):
            stem = f"layers.{group}.residual_group.blocks.{block}."
            layer(stem + "norm1", channels)
            shapes[stem + "attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, hat.heads)
            layer(stem + "attn.qkv", 3 * channels, channels)
            layer(stem + "attn.proj", channels, channels)
            layer(stem + "conv_block.cab.0", compressed, channels, 3, 3)
            layer(stem + "conv_block.cab.2", channels, compressed, 3, 3)
            layer(stem + "conv_block.cab.3.attention.1", squeezed, channels, 1, 1)
            layer(stem + "conv_block.cab.3.attention.3", channels, squeezed, 1, 1)
            layer(stem + "norm2", channels)
            layer(stem + "mlp.fc1", 2 * channels, channels)
            layer(stem + "mlp.fc2", channels, 2 * channels)
        stem = f"layers.{group}.residual_group.overlap_attn."
        layer(stem + "norm1", channels)
        shapes[stem + "relative_position_bias_table"] = ((window + key_window - 1) ** 2, hat.heads)
        layer(stem + "qkv", 3 * channels, channels)
        layer(stem + "proj", channels, channels)
        layer(stem + "norm2", channels)
        layer(stem + "mlp.fc1", 2 * channels, channels)
        layer(stem + "mlp.fc2", channels, 2 * channels)
        layer(f"layers.{group}.conv", channels, channels, 3, 3)
    layer("norm", channels)
    layer("conv_after_body", channels, channels, 3, 3)
    layer("conv_before_upsample.0", 64, channels, 3, 3)
    for stage, factor in enumerate({2: [2], 3: [3], 4: [2, 2]}[hat.scale]):
        layer(f"upsample.{2 * stage}", 64 * factor**2, 64, 3, 3)
    layer("conv_last", 3, 64, 3, 3)
    return shapes


def published_index(window: int, key_window: int, offset: int, sign: int) -> Tensor:
    """Return ``sign·(query − key) + offset`` along both axes; coordinates count from the first pixel of each window."""
    query = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    key = torch.cartesian_prod(torch.arange(key_window), torch.arange(key_window))
    dy, dx = (sign * (query[:, None] - key[None, :]) + offset).unbind(-1)
    return dy * (window + key_window - 1) + dx


# The recipe: values that depend only on a name


def uniform(seed: str, shape: tuple[int, ...]) -> Tensor:
    """Return values in [0, 1), multiples of 2⁻²⁴ from the Mersenne twister, which are the same on every machine."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))


def random_weights(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return weights with which every part matters: attention logits and outputs deviate by about 1 or more."""
    noise = (2 * uniform(name, shape) - 1) * 3**0.5  # unit variance
    if name.endswith("bias_table"):
        return noise
    if name.endswith(".bias"):
        return 0.2 * noise
    if len(shape) == 1:  # the scale of a LayerNorm
        return 1 + 0.3 * noise
    fan_in = torch.Size(shape[1:]).numel()
    gain = 1.5 if ".qkv." in name else 100.0 if ".cab.2." in name else 1.0  # a HAB adds 0.01 of its CAB
    return gain * fan_in**-0.5 * noise


def checkpoint(hat: Architecture) -> dict[str, Tensor]:
    """Return a state dict as the published code saves it, with random values."""
    window, key_window = hat.window, hat.key_window
    indices = {
        "relative_position_index_SA": published_index(window, window, window - 1, 1),
        "relative_position_index_OCA": published_index(window, key_window, window - key_window + 1, -1),
    }
    shapes = published_shapes(hat)
    return indices | {name: random_weights(name, shapes[name]) for name in shapes.keys() - indices.keys()}


def hollow_checkpoint(hat: Architecture) -> dict[str, Tensor]:
    """Return a state dict with the same names and shapes that needs almost no memory: every tensor is one zero."""
    shapes = published_shapes(hat)
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items() if "index" not in name}


def low_resolution(size: str) -> Tensor:
    """Return a random image, ``(1, 3, h, w)``."""
    height, width = map(int, size.split("x"))
    return uniform(f"lr {size}", (1, 3, height, width))


def fingerprint() -> Tensor:
    """Return some values of the recipe, which are recorded beside the outputs."""
    return random_weights("layers.0.residual_group.overlap_attn.qkv.weight", (2, 3))


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    """Return a checkpoint that loads fast. Tests copy the dictionary before they change it."""
    return checkpoint(ARCHITECTURES["small-x2"])


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    """Return the message with which a checkpoint is refused, after checking that it is short and names the file."""
    with pytest.raises(ValueError, match=str(path)) as caught:
        savl.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < len(str(path)) + 600, message
    return message


# Outputs


def test_random_weights_are_the_ones_the_outputs_were_recorded_with(golden: dict[str, Tensor]) -> None:
    assert torch.equal(fingerprint(), golden["fingerprint"]), (
        "torch.rand no longer gives the values it gave when the outputs were recorded: record them again"
    )


@pytest.mark.parametrize("name", CASES)
def test_output_equals_the_published_one(name: str, golden: dict[str, Tensor], tmp_path: Path) -> None:
    model = savl.load(write(tmp_path / "hat.pth", {"params_ema": checkpoint(ARCHITECTURES[name])}))
    for size in CASES[name]:
        expected = golden[f"{name} {size}"]
        with torch.no_grad():
            sr = model(low_resolution(size))
        assert sr.shape == expected.shape, f"{name} at {size}"
        difference = (sr - expected).abs().max().item()
        assert difference <= TOLERANCE, f"{name} at {size} is off by {difference:.2e}"


def test_recorded_outputs_vary_enough_to_show_a_wrong_index(golden: dict[str, Tensor]) -> None:
    deviations = {case: output.std().item() for case, output in golden.items() if output.numel() > 100}
    assert min(deviations.values()) > 1000 * TOLERANCE, deviations


# Hyper-parameters from tensor shapes

PUBLISHED = [  # configuration, architecture, parameters at ×4
    ("hat-s", HAT_S, 9_621_183),
    ("hat", HAT, 20_772_507),
    ("hat-l", HAT_L, 40_846_575),
]


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("name", "hat", "parameters"), PUBLISHED)
def test_hyper_parameters_follow_from_tensor_shapes(name: str, hat: Architecture, parameters: int, scale: int) -> None:
    tensors = hollow_checkpoint(replace(hat, scale=scale))
    assert is_hat(tensors)
    assert hat_config(tensors) == replace(savl.CONFIGS[name], scale=scale)
    assert scale != 4 or sum(tensor.numel() for tensor in tensors.values()) == parameters


@pytest.mark.parametrize(("name", "hat", "parameters"), PUBLISHED)
def test_loaded_networks_have_the_published_number_of_parameters(
    name: str, hat: Architecture, parameters: int, tmp_path: Path
) -> None:
    model = savl.load(write(tmp_path / "hollow.pth", hollow_checkpoint(hat)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.config == savl.CONFIGS[name]


def test_an_uneven_mlp_ratio_survives_rounding() -> None:
    tensors = hollow_checkpoint(replace(SMALL, channels=22, heads=2))
    stem = "layers.0.residual_group.blocks.0.mlp.fc1.weight"
    tensors[stem] = torch.zeros(30, 22)
    assert int(22 * hat_config(tensors).mlp_ratio) == 30


# Layouts of checkpoints


@pytest.mark.parametrize("form", ["plain", "params", "params_ema", "both", "parameters", "legacy", "half"])
def test_every_form_of_checkpoint_loads(form: str, small: dict[str, Tensor], tmp_path: Path) -> None:
    weights = OrderedDict((name, tensor) for name, tensor in small.items() if tensor.is_floating_point())
    content = {
        "params": {"params": weights},
        "params_ema": {"params_ema": weights},
        "both": {"params": {name: 0 * weights[name] for name in weights}, "params_ema": weights, "epoch": 3},
        "parameters": {name: nn.Parameter(weights[name]) for name in weights},
        "half": {name: weights[name].half() for name in weights},
    }.get(form, OrderedDict(small))
    path = tmp_path / "hat.pth"
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")

    model = savl.load(path)
    loaded = model.conv_first.weight
    expected = small["conv_first.weight"]
    assert torch.equal(loaded, expected.half().float() if form == "half" else expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_safetensors_give_the_network_that_pth_gives(small: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(small, tmp_path / "hat.safetensors")
    from_safetensors = savl.load(tmp_path / "hat.safetensors").state_dict()
    from_pickle = savl.load(write(tmp_path / "hat.pth", small)).state_dict()
    assert from_safetensors.keys() == from_pickle.keys()
    assert all(torch.equal(from_safetensors[name], from_pickle[name]) for name in from_pickle)


def test_a_hat_checkpoint_saved_by_savl_loads_again(small: dict[str, Tensor], tmp_path: Path) -> None:
    model = savl.load(write(tmp_path / "hat.pth", small))
    savl.weights.save(model, tmp_path / "again.safetensors")
    again = savl.load(tmp_path / "again.safetensors")
    lr = low_resolution("5x7")
    with torch.no_grad():
        assert torch.equal(model(lr), again(lr))


# Refused checkpoints


def test_missing_unknown_and_misshapen_tensors_are_reported(small: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = dict(small)
    del tensors["layers.1.residual_group.overlap_attn.proj.bias"]
    tensors["layers.0.residual_group.blocks.0.attn.temperature"] = torch.zeros(3)
    tensors["layers.1.residual_group.blocks.1.conv_block.cab.3.attention.1.weight"] = torch.zeros(4, 24, 3, 3)
    message = refusal(write(tmp_path / "hat.pth", tensors))
    assert "1 missing: layers.1.residual_group.overlap_attn.proj.bias;" in message
    assert "1 unknown: layers.0.residual_group.blocks.0.attn.temperature;" in message
    assert (
        "1 misshapen: layers.1.residual_group.blocks.1.conv_block.cab.3.attention.1.weight "
        "(4, 24, 3, 3) instead of (4, 24, 1, 1)" in message
    )


def test_many_missing_tensors_are_counted_not_listed(small: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in small.items() if not name.endswith(".bias")}
    message = refusal(write(tmp_path / "hat.pth", tensors))
    assert f"{len(small) - len(tensors)} missing: " in message
    assert message.endswith(", ...")


def test_integer_weights_are_refused(small: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {**small, "norm.weight": torch.ones(24, dtype=torch.int64)}
    assert "1 not floating: norm.weight torch.int64" in refusal(write(tmp_path / "hat.pth", tensors))


@pytest.mark.parametrize(
    "name",
    [
        "conv_last.weight",
        "layers.0.residual_group.blocks.0.attn.relative_position_bias_table",
        "layers.0.residual_group.overlap_attn.relative_position_bias_table",
        "layers.0.residual_group.blocks.0.conv_block.cab.0.weight",
    ],
)
def test_a_tensor_that_shows_a_hyper_parameter_must_be_there(
    name: str, small: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = dict(small)
    del tensors[name]
    assert f"lacks the tensor {name}" in refusal(write(tmp_path / "hat.pth", tensors))
    tensors[name] = torch.zeros(24)
    assert f"its tensor {name} must have" in refusal(write(tmp_path / "hat.pth", tensors))


def test_a_network_for_gray_images_is_refused(small: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {**small, "conv_first.weight": torch.zeros(24, 1, 3, 3)}
    assert "only RGB checkpoints load" in refusal(write(tmp_path / "hat.pth", tensors))


def test_a_bias_table_of_no_square_window_is_refused(small: dict[str, Tensor], tmp_path: Path) -> None:
    name = "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"
    tensors = {**small, name: torch.zeros(960, 3)}
    assert "must be a square, got 960" in refusal(write(tmp_path / "hat.pth", tensors))


# Indices of the bias tables


@pytest.mark.parametrize("name", ["relative_position_index_SA", "relative_position_index_OCA"])
def test_an_index_of_another_kind_is_refused(name: str, small: dict[str, Tensor], tmp_path: Path) -> None:
    for index in (small[name] + 1, small[name].flip(0), small[name][:64, :64]):
        path = write(tmp_path / "hat.pth", {**small, name: index})
        assert f"its {name} is not the one that the published HAT has" in refusal(path)


def test_the_index_buffers_may_be_missing_or_wrapped(small: dict[str, Tensor], tmp_path: Path) -> None:
    name = "relative_position_index_OCA"
    assert small[name].min() < 0, "the published index counts from the end of its table"
    savl.load(write(tmp_path / "wrapped.pth", {**small, name: small[name] % (16 + 24 - 1) ** 2}))
    savl.load(write(tmp_path / "none.pth", {name: small[name] for name in small if "index" not in name}))


@pytest.mark.parametrize(("window", "key_window"), [(16, 24), (8, 12), (2, 4), (4, 4), (6, 10)])
def test_the_overlap_index_is_the_published_one(window: int, key_window: int) -> None:
    expected = published_index(window, key_window, window - key_window + 1, -1)
    assert torch.equal(published_overlap_index(window, key_window), expected)


@pytest.mark.parametrize(("window", "key_window"), [(16, 24), (4, 6)])
def test_a_reordered_overlap_table_gives_every_pair_its_published_bias(window: int, key_window: int) -> None:
    table = torch.arange((window + key_window - 1) ** 2).unsqueeze(1)  # every row has a different value
    published = table[published_index(window, key_window, window - key_window + 1, -1)]
    ours = reorder_overlap_table(table, window, key_window)
    query_minus_key = published_index(window, key_window, key_window - 1, 1)
    assert torch.equal(ours[query_minus_key], published)
