"""The numbers of SVDQuant Compare, against scikit-image's."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from svdq_core.compare import compare
from svdq_core.errors import SVDQuantError


def images(batch=2, size=32, channels=3):
    """Smooth images and noisy ones of them."""
    random = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, size).expand(batch, size, size).unsqueeze(-1).repeat(1, 1, 1, channels)
    return ramp, (ramp + 0.1 * torch.randn(ramp.shape, generator=random)).clamp(0, 1)


def test_psnr_and_ssim_are_those_of_scikit_image():
    reference, image = images()
    done = compare(image, reference, 4.0)
    pairs = list(zip(reference.double().numpy(), image.double().numpy(), strict=True))
    psnr = sum(peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs) / 2
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = sum(structural_similarity(*pair, channel_axis=-1, data_range=1, **options) for pair in pairs) / 2
    assert done.psnr == pytest.approx(psnr, abs=1e-3)
    assert done.ssim == pytest.approx(ssim, abs=2e-3)


def test_equal_images():
    reference, _ = images()
    done = compare(reference, reference.clone(), 4.0)
    assert done.psnr == math.inf and done.ssim == pytest.approx(1) and not done.difference.any()


def test_the_difference_is_amplified_and_stays_an_image():
    reference, image = images()
    difference = compare(image, reference, 3.0).difference
    assert torch.allclose(difference, ((image - reference).abs() * 3).clamp(max=1))


def test_one_reference_serves_many_images_and_alpha_is_left_out():
    reference, image = images(batch=3, channels=4)
    assert compare(image, reference[:1], 1.0).difference.shape == (3, 32, 32, 3)


@pytest.mark.parametrize(
    ("shape", "why"), [((2, 32, 16, 3), "16 x 32 and 32 x 32"), ((3, 32, 32, 3), "3 images cannot be compared with 2")]
)
def test_images_that_do_not_fit_are_refused(shape, why):
    reference, _ = images()
    with pytest.raises(SVDQuantError, match=why):
        compare(torch.zeros(shape), reference, 4.0)


def test_a_number_that_is_missing_says_why():
    reference, image = images(size=8)
    done = compare(image, reference, 4.0)
    assert math.isnan(done.ssim) and "11 pixels" in done.text() and "SSIM -" in done.text()


def test_lpips_is_computed_or_says_what_it_needs():
    reference, image = images(size=64)
    done = compare(image, reference, 4.0)
    assert done.lpips > 0 or (math.isnan(done.lpips) and "LPIPS needs" in done.text())
