"""CFCN: the parameter counts of the paper's Table 1, upsampling, decoders and export."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from crowdray.config import Config, ModelConfig, SamplingConfig
from crowdray.data.image_cache import downsample_image
from crowdray.models.build import build_counter
from crowdray.models.counter import AUXILIARY, COUNT, DENSITY, DEPTH, SEGMENTATION, Counter
from crowdray.models.decoders import FixedUpsample
from crowdray.models.export import ExportedCounter

from ..support.counters import parameters


@pytest.fixture(scope="module")
def counter() -> Counter:
    return build_counter(Config(), density_scale=100.0)


def test_cfcn_has_the_parameter_counts_of_table_1(counter: Counter) -> None:
    assert parameters(counter.encoder) == 310_080
    assert parameters(counter.decoders[DENSITY]) == 204_864
    assert parameters(counter.decoders[DEPTH]) == 204_864
    assert parameters(counter.decoders[SEGMENTATION]) == 204_864 + 2  # scale and bias of the logit
    assert parameters(counter.decoders[COUNT]) == 13_109_377
    assert parameters(counter.strip()) == 310_080 + 204_864


def test_build_counter_depends_on_the_seed_and_preserves_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = build_counter(Config(seed=1), 1.0), build_counter(Config(seed=1), 1.0)
    other = build_counter(Config(seed=2), 1.0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_upsampling_keeps_a_constant_map_up_to_the_border() -> None:
    torch.testing.assert_close(FixedUpsample()(torch.full((1, 3, 5, 6), 0.7)), torch.full((1, 3, 11, 13), 0.7))


def test_density_decoder_equals_the_two_grouped_deconvolutions(counter: Counter) -> None:
    """64 -> 32 -> 1 channels, each the mean of its group: averaging first yields the same map."""
    decoder = counter.decoders[DENSITY]
    features = torch.rand(1, 128, 10, 11)
    taps = torch.tensor([1.0, 2, 3, 4, 3, 2, 1]) / 8
    kernel = torch.outer(taps, taps)
    x = torch.relu(decoder.get_submodule("conv")(features))
    for groups in (32, 1):
        size = x.shape[1] // groups
        weight = kernel.expand(x.shape[1], 1, 7, 7) / size
        x = F.conv_transpose2d(F.pad(x, (1, 2, 1, 2), mode="replicate"), weight, stride=2, padding=5, groups=groups)
    torch.testing.assert_close(decoder(features), x)


def test_counter_outputs_negative_logits_but_no_negative_density(counter: Counter) -> None:
    outputs = counter(torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8), (DENSITY, SEGMENTATION))
    assert outputs[SEGMENTATION].min() < 0
    assert outputs[DENSITY].min() >= 0


def test_count_decoder_reads_the_square_at_its_corner(counter: Counter) -> None:
    images = torch.randint(0, 256, (2, 3, 200, 240), dtype=torch.uint8)
    corners = torch.tensor([[3, 5], [10, 20]])
    together = counter(images, (COUNT,), corners)[COUNT]
    features = counter.features(images)
    for index, (row, column) in enumerate(corners.tolist()):
        square = features[index : index + 1, :, row : row + 40, column : column + 40]
        torch.testing.assert_close(counter.decoders[COUNT](square)[0], together[index])


def test_stripped_counter_has_the_density_of_the_full_counter(counter: Counter) -> None:
    images = torch.randint(0, 256, (1, 3, 97, 133), dtype=torch.uint8)
    full = counter(images, (DENSITY, SEGMENTATION, DEPTH))[DENSITY] / counter.density_scale
    stripped = counter.strip()
    assert torch.equal(stripped.density(images), full)
    assert not any(task in name for name, _ in stripped.named_parameters() for task in AUXILIARY)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_exported_counter_downsamples_as_in_training(counter: Counter, factor: int) -> None:
    image = torch.randint(0, 256, (1, 3, 101, 134), dtype=torch.uint8)
    pixels = downsample_image(image[0].permute(1, 2, 0).contiguous().numpy(), factor)
    small = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    exported = ExportedCounter(counter, factor)
    assert torch.equal(exported(image), counter.density(small))
    assert torch.equal(exported(image.float()), exported(image))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_compiled_counter_does_not_recompile_for_new_corners() -> None:
    """As Python numbers, corners would make the compiler specialize a graph for each batch."""
    config = Config(sampling=SamplingConfig(crop=32, context=32), model=ModelConfig("cfcn", "pooled"))
    counter = build_counter(config, density_scale=1.0).eval()
    image = torch.rand(2, 3, 64, 96) * 255
    graphs = CompileCounter()
    compiled = torch.compile(counter.forward, backend=graphs)
    seen = []
    for corner in range(5):
        corners = torch.tensor([[corner, 0], [1, corner]])
        expected = counter(image, ("density", "count"), corners)
        found = compiled(image, ("density", "count"), corners)
        seen.append(graphs.frame_count)
        torch.testing.assert_close(found, expected)
    assert seen == [seen[0]] * 5
