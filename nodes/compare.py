"""SVDQuant Compare."""

from nodes import PreviewImage

from ..svdq_core.compare import compare


class SVDQuantCompare:
    """Two images -> how close they are, as numbers and as an amplified difference."""

    CATEGORY = "SVDQuant"
    DESCRIPTION = (
        "Shows two images under a slider in the node and says how close they are: PSNR, SSIM and, where the "
        "package lpips and its weights are installed, LPIPS. Draw both with the same seed and settings."
    )
    FUNCTION = "compare"
    OUTPUT_NODE = True
    RETURN_TYPES = ("IMAGE", "FLOAT", "FLOAT", "FLOAT", "STRING")
    RETURN_NAMES = ("difference", "psnr", "ssim", "lpips", "report")
    OUTPUT_TOOLTIPS = (
        "The absolute difference, amplified.",
        "Peak signal-to-noise ratio in dB, mean over the batch. Higher is closer; infinite for equal images.",
        "Structural similarity. 1 for equal images.",
        "Learned perceptual distance. 0 for equal images; NaN where lpips or its weights are not installed.",
        "The numbers as text, and why one is missing.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "reference": ("IMAGE", {"tooltip": "The image to come close to, such as the 16-bit model's."}),
                "image": ("IMAGE", {"tooltip": "The image to judge, such as the 4-bit model's. Of the same size."}),
                "gain": (
                    "FLOAT",
                    {
                        "default": 4.0,
                        "min": 1.0,
                        "max": 100.0,
                        "step": 0.5,
                        "tooltip": "How much the difference image is amplified.",
                    },
                ),
            }
        }

    def compare(self, reference, image, gain: float):
        done = compare(image, reference, gain)
        previews = [PreviewImage().save_images(images)["ui"]["images"] for images in (reference, image)]
        return {
            "ui": {"text": [done.text()], "svdquant_reference": previews[0], "svdquant_image": previews[1]},
            "result": (done.difference, done.psnr, done.ssim, done.lpips, done.text()),
        }
